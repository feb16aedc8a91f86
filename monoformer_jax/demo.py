"""A page to talk with a trained model, in texts and pictures; the model decides when to paint.

  python -m monoformer_jax.demo --workdir=runs/digits
  python -m monoformer_jax.demo --workdir=runs/imagenet --vae=sd-vae-ft-mse --port=8000

The page is served to this machine alone, asks nothing of any other, and answers one message at a time.
--share=true lends it a public address for a week, through gradio's servers: for Colab, where nothing
else reaches it.
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

from monoformer_jax.cli import run_command
from monoformer_jax.data.image_io import open_image
from monoformer_jax.errors import InputError, require

MOST_CONVERSATIONS = 1000  # that are kept; the one that was silent for longest goes
_PREVIEWS = 8  # of an image
_SIDE = 128  # pixels that a picture on the page has at least, or 8×8 digits would be specks
# Gradio's button posts what it shows on a public site.
_STYLE = "#chat button:is([title='Share'], [aria-label='Share']) { display: none }"
# The browser refuses whatever the page might ask of another machine.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:"
)

Message = dict[str, Any]  # {"role": "user" or "assistant", "content": [texts and PIL images]}


@dataclasses.dataclass
class _Conversation:
    messages: list[Message] = dataclasses.field(default_factory=list)
    now: list[Message] | None = (
        None  # with the answer as far as it is there; None: nothing is asked
    )
    error: InputError | None = None  # of the last message, which is not among the others then
    dropped: bool = False
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def show(self, now: list[Message] | None) -> None:
        with self.changed:
            self.now = now
            self.changed.notify_all()


class _Dropped(Exception):
    """Nobody wants this answer any more."""


class Conversations:
    """What was said, by the number of the conversation; the page is only a view of it.

    Answers are made one at a time, in a thread of their own, so that they come to their end when the
    page is closed or loaded again.
    """

    def __init__(self, model):
        """Args:
        model: see `monoformer_jax.Model`.
        """
        self.model = model
        self._model_is_free = threading.Lock()
        self._all: collections.OrderedDict[str, _Conversation] = collections.OrderedDict()

    def open(self, number: str | None) -> str:
        """The conversation of that number, or a new one where there is none."""
        if number not in self._all:
            number = secrets.token_urlsafe(16)
            self._all[number] = _Conversation()
        self._all.move_to_end(number)
        while len(self._all) > MOST_CONVERSATIONS:
            self._all.popitem(last=False)
        return number

    def forget(self, number: str) -> None:
        """Empties it; an answer that is under way is given up."""
        self._all[number].dropped = True
        self._all[number] = _Conversation()

    def watch(self, number: str) -> Iterator[tuple[list[Message], bool]]:
        """All messages, again whenever the answer has grown, and whether it is still under way."""
        talk = self._all[number]
        while (now := talk.now) is not None:
            yield now, True
            with talk.changed:
                talk.changed.wait_for(lambda now=now: talk.now is not now)
        yield talk.messages, False

    def say(
        self, number: str, content: list, *, remember: bool, max_tokens: int, seed: int, **sampling
    ) -> Iterator[tuple[list[Message], bool]]:
        """Asks, and watches the answer.

        Args:
          content: texts, and pictures or their files.
          remember: whether the model sees what was said before.
          sampling: see `Model.chat`.

        Raises:
          InputError: see `Model.chat`; or it is still answering. The conversation stays as it was.
        """
        talk = self._all[number]
        require(talk.now is None, "the answer before is not there yet: wait for it")
        content = [part for part in content if part]
        require(bool(content), "there is nothing to answer: write something, or show a picture")
        content = [x if isinstance(x, str) else open_image(x, "the picture") for x in content]
        said = {"role": "user", "content": content}
        seen = [*(talk.messages if remember else ()), said]
        talk.show([*talk.messages, said])
        arguments = {"max_tokens": max_tokens, "seed": seed, **sampling}
        threading.Thread(target=self._answer, args=(talk, seen, arguments), daemon=True).start()
        yield from self.watch(number)
        if talk.error is not None:
            raise talk.error

    def _answer(self, talk: _Conversation, seen: list[Message], arguments: dict) -> None:
        asked = talk.now

        def grown(parts):
            return [*asked, {"role": "assistant", "content": parts}]

        def preview(step, parts):
            if talk.dropped:
                raise _Dropped
            talk.show(grown(parts))

        talk.error = None
        try:
            with self._model_is_free:
                every = max(1, arguments["steps"] // _PREVIEWS)
                parts = self.model.chat(seen, preview=preview, every=every, **arguments)
            talk.messages = grown(parts)
        except InputError as error:
            talk.error = error
        except _Dropped:
            pass
        finally:
            talk.show(None)


def _view(messages: list[Message]) -> list[dict]:
    """Messages as gradio's chatbot shows them: one a part, small pictures enlarged."""
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


def _enlarged(picture):
    import PIL.Image

    scale = max(1, _SIDE // max(picture.size))
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, PIL.Image.Resampling.NEAREST)


def make_page(model, title: str):
    """The page of a model, a `gradio.Blocks`."""
    import gradio as gr

    talks, sampling = Conversations(model), model.config.sampling

    def view(number, watched, *more):
        for messages, under_way in watched:
            yield number, _view(messages), "answering …" if under_way else "", *more

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
            # The message goes back to where it was written.
            for shown in view(number, talks.watch(number), message):
                yield *shown[:2], f"**{_sentence(error)}**", message

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        number = gr.BrowserState(None, storage_key="monoformer_conversation")
        gr.Markdown(f"## {title}\nWrite, or show a picture. The model answers with text or paints.")
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
            most = gr.Number(64, precision=0, minimum=1, label="Most tokens of text")
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
    """Adds `_POLICY` to every answer."""

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
    """Serves the page, until it is interrupted if `wait`; returns its address.

    Raises:
      InputError: the port is taken.
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
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder, of a model of latents")
    parser.add_argument("--vision", type=Path, help="folder of the CLIP tower, where one is needed")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument(
        "--share", choices=("true", "false"), default="false", help="lend it a public address"
    )


def main(args: argparse.Namespace) -> None:
    import os

    # Gradio asks its makers for the newest version, and tells them of use, unless told not to.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("the page needs gradio: pip install -e '.[demo]'") from error
    import monoformer_jax

    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision)
    model.image_processor.check_decodable()
    title = f"{model.config.name}, step {model.step}"
    serve(make_page(model, title), args.port, args.share == "true")


if __name__ == "__main__":
    run_command("demo", __doc__, add_arguments, main)
