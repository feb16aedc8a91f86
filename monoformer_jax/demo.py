"""Gradio chat with a trained model, in text and images; the model chooses when to generate an image.

  python -m monoformer_jax.demo --workdir=runs/digits
  python -m monoformer_jax.demo --workdir=runs/imagenet --vae=sd-vae-ft-mse --port=8000

The page is served on localhost only, makes no external requests, and answers one message at a time.
--share=true creates a public URL for a week, through gradio's servers: for Colab, where the page is not
reachable otherwise.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monoformer_jax.cli import integer, local_path, run_command, storage_path
from monoformer_jax.data.content import looks_like_image
from monoformer_jax.data.image_io import open_image
from monoformer_jax.errors import InputError, require, require_unicode

MOST_CONVERSATIONS = 1000  # kept in memory; the least recently used is dropped
_PREVIEWS = 8  # per image, about
_SIDE = 128  # pixels up to which small images, such as 8×8 digits, are enlarged
# Hides gradio's share button, which publishes the chat on a public site.
_STYLE = "#chat button:is([title='Share'], [aria-label='Share']) { display: none }"
# Content security policy: the browser blocks requests to other hosts.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:"
)

Message = dict[str, Any]  # {"role": "user" or "assistant", "content": [texts and PIL images]}


@dataclasses.dataclass
class _Conversation:
    messages: list[Message] = dataclasses.field(default_factory=list)
    pending: list[Message] | None = None  # messages with the partial answer; None: not answering
    error: InputError | None = None  # raised by the last message, which is then not in `messages`
    cancelled: bool = False
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def update(self, pending: list[Message] | None) -> None:
        with self.changed:
            self.pending = pending
            self.changed.notify_all()


class _Cancelled(Exception):
    """The conversation was cleared while its answer was generated."""


class Conversations:
    """Message history of every conversation, by conversation id; the page only displays it.

    Answers are generated one at a time, each in a background thread, so that generation continues
    when the page is closed or reloaded.
    """

    def __init__(self, model):
        """Args:
        model: see `monoformer_jax.Model`.
        """
        self.model = model
        self._model_lock = threading.Lock()
        self._all: collections.OrderedDict[str, _Conversation] = collections.OrderedDict()

    def open(self, number: str | None) -> str:
        """Returns the id `number` if such a conversation exists, else the id of a new one."""
        if number not in self._all:
            number = secrets.token_urlsafe(16)
            self._all[number] = _Conversation()
        self._all.move_to_end(number)
        while len(self._all) > MOST_CONVERSATIONS:
            self._all.popitem(last=False)
        return number

    def forget(self, number: str) -> None:
        """Clears the conversation and cancels an answer in progress."""
        self._all[number].cancelled = True
        self._all[number] = _Conversation()

    def watch(self, number: str) -> Iterator[tuple[list[Message], bool]]:
        """Yields (all messages, whether the answer is in progress) whenever the answer grows."""
        talk = self._all[number]
        while (pending := talk.pending) is not None:
            yield pending, True
            with talk.changed:
                talk.changed.wait_for(lambda pending=pending: talk.pending is not pending)
        yield talk.messages, False

    def say(
        self, number: str, content: list, *, remember: bool, max_tokens: int, seed: int, **sampling
    ) -> Iterator[tuple[list[Message], bool]]:
        """Sends a user message and yields the growing answer, as `watch` does.

        Args:
          content: texts, and images or their files.
          remember: whether the model also receives the earlier messages.
          max_tokens, seed, sampling: see `Model.chat`.

        Raises:
          InputError: see `Model.chat`, or the previous answer is not complete. The conversation is
            unchanged then.
        """
        talk = self._all[number]
        require(talk.pending is None, "the previous answer is not complete: wait for it")
        content = [part for part in content if part]
        require(bool(content), "the message is empty: write text or attach an image")
        for text in content:
            if isinstance(text, str):
                require_unicode(text, "the message")
        content = [x if isinstance(x, str) else open_image(x, "the image") for x in content]
        message = {"role": "user", "content": content}
        context = [*(talk.messages if remember else ()), message]
        talk.update([*talk.messages, message])
        arguments = {"max_tokens": max_tokens, "seed": seed, **sampling}
        threading.Thread(target=self._answer, args=(talk, context, arguments), daemon=True).start()
        yield from self.watch(number)
        if talk.error is not None:
            raise talk.error

    def _answer(self, talk: _Conversation, context: list[Message], arguments: dict) -> None:
        messages = talk.pending

        def with_answer(parts):
            return [*messages, {"role": "assistant", "content": parts}]

        def preview(step, parts):
            if talk.cancelled:
                raise _Cancelled
            talk.update(with_answer(parts))

        talk.error = None
        try:
            with self._model_lock:
                every = max(1, arguments["steps"] // _PREVIEWS)
                asked = [message | {"content": _texts(message["content"])} for message in context]
                parts = self.model.chat(asked, preview=preview, every=every, **arguments)
            talk.messages = with_answer(parts)
        except InputError as error:
            talk.error = error
        except _Cancelled:
            pass
        finally:
            talk.update(None)


def _texts(content: list) -> list:
    """Marks what a person wrote as a text where `Model.chat` would take it for the path of an image."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) and looks_like_image(part) else part
        for part in content
    ]


def _view(messages: list[Message]) -> list[dict]:
    """Converts messages for gradio's chatbot: one message per part, small images enlarged."""
    import gradio as gr

    shown = []
    for message in messages:
        for part in message["content"]:
            if not isinstance(part, str):
                part = gr.Image(
                    _enlarged(part), format="png", show_label=False, container=False,
                    buttons=["download"],
                )  # fmt: skip
            shown.append({"role": message["role"], "content": part})
    return shown


def _enlarged(image):
    import PIL.Image

    scale = max(1, _SIDE // max(image.size))
    size = (image.width * scale, image.height * scale)
    return image.resize(size, PIL.Image.Resampling.NEAREST)


def make_page(model, title: str):
    """Builds the page as a `gradio.Blocks`."""
    import gradio as gr

    talks, sampling = Conversations(model), model.config.sampling

    def view(number, watched, *more):
        for messages, in_progress in watched:
            yield number, _view(messages), "answering …" if in_progress else "", *more

    def show(number):
        number = talks.open(number)
        yield from view(number, talks.watch(number))

    def start_anew(number):
        number = talks.open(number)
        talks.forget(number)
        return number, [], ""

    def say(number, message, remember, steps, guidance, seed, most):
        number = talks.open(number)
        content = [message.get("text"), *map(Path, message.get("files") or [])]
        try:
            yield from view(number, talks.say(
                number, content, remember=remember, max_tokens=int(most), seed=int(seed or 0),
                steps=int(steps), guidance=float(guidance),
            ), None)  # fmt: skip
        except InputError as error:
            # Put the message back into the input box.
            for shown in view(number, talks.watch(number), message):
                yield *shown[:2], f"**{_sentence(error)}**", message

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        number = gr.BrowserState(None, storage_key="monoformer_conversation")
        gr.Markdown(f"## {title}\nSend text or images; the model answers with text or images.")
        chat = gr.Chatbot(
            show_label=False, render_markdown=False, height="65vh", layout="bubble", buttons=[],
            feedback_options=None, elem_id="chat",
        )  # fmt: skip
        notice = gr.Markdown(elem_id="notice")
        box = gr.MultimodalTextbox(
            file_types=["image"], file_count="multiple", show_label=False, autofocus=True,
            placeholder="draw a seven", elem_id="box",
        )  # fmt: skip
        with gr.Row():
            steps = gr.Slider(1, 100, sampling.steps, step=1, label="Steps")
            guidance = gr.Slider(1, 10, sampling.guidance, step=0.1, label="Guidance")
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
            most = gr.Number(64, precision=0, minimum=1, label="Max text tokens")
        with gr.Row():
            remember = gr.Checkbox(False, label="The model sees earlier messages too")
            anew = gr.Button("New conversation", size="sm", elem_id="anew")
        seen = [number, chat, notice]
        asked = box.submit(
            say, [number, box, remember, steps, guidance, seed, most], [*seen, box], api_name="say",
            concurrency_limit=1, show_progress="hidden",
        )  # fmt: skip
        gr.on([anew.click, chat.clear], start_anew, number, seen, api_name="start_anew",
              cancels=[asked])  # fmt: skip
        page.load(show, number, seen, api_name="show", concurrency_limit=None,
                  show_progress="hidden")  # fmt: skip
    return page


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + "."


class _Policy:
    """ASGI middleware that adds `_POLICY` to every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with(message):
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with)


def serve(page, port: int, share: bool = False, wait: bool = True) -> str:
    """Serves the page and returns its URL; with `wait`, blocks until interrupted.

    Raises:
      InputError: the port cannot be served.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="slate", font=fonts[0], font_mono=fonts[1])
    try:
        _, address, _ = page.queue().launch(
            server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=True,
            quiet=True, theme=theme, css=_STYLE, footer_links=[], ssr_mode=False,
            app_kwargs={"middleware": [Middleware(_Policy)]},
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--port={port} cannot be served: {error}") from error
    print(f"serving {address}", flush=True)
    if wait:
        page.block_thread()
    return address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=storage_path, required=True, help="folder of the trained run"
    )
    parser.add_argument("--vae", type=local_path, help="folder of the VAE, for a latent model")
    parser.add_argument(
        "--vision", type=local_path, help="folder of the CLIP vision tower, if the model needs one"
    )
    parser.add_argument("--port", type=integer(0, 65535), default=7860, help="default 7860")
    parser.add_argument(
        "--share", choices=("true", "false"), default="false", help="create a public URL"
    )


def main(args: argparse.Namespace) -> None:
    import os

    # Otherwise gradio sends telemetry and checks for new versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("the demo needs gradio: pip install -e '.[demo]'") from error
    import monoformer_jax

    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision)
    model.image_processor.codec.check()
    title = f"{model.config.name}, step {model.step}"
    serve(make_page(model, title), args.port, args.share == "true")


if __name__ == "__main__":
    run_command("demo", __doc__, add_arguments, main)
