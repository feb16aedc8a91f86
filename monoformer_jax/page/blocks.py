"""The page as a `gradio.Blocks`: what it shows, and what its controls do."""

from __future__ import annotations

import asyncio
import html
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import gradio as gr

from monoformer_jax.errors import InputError
from monoformer_jax.page.conversations import Conversations, Message
from monoformer_jax.page.pictures import Picture
from monoformer_jax.page.settings import MOST_ANSWERS, MOST_TOKENS

# Galleries as high as their pictures, with captions below them instead of over them. The notice takes
# its room from the start, so that nothing moves when it appears.
STYLE = """
#chat .grid-wrap { height: auto; min-height: 0; max-height: none; overflow: visible }
#chat .thumbnail-item { aspect-ratio: auto; display: flex; flex-direction: column; height: auto;
  max-width: 256px }
#chat .thumbnail-item img { width: 100%; height: auto; margin: 0; border-radius: 0 }
#chat .caption-label { position: static; max-width: none }
#notice { min-height: 1.6em }
@media (max-width: 700px) { #chat { height: 45vh !important } }
#enlarged { margin: auto; padding: 1em; color-scheme: light dark; background: Canvas;
  color: CanvasText }
#enlarged img { width: min(80vw, 70vh); image-rendering: pixelated }
#enlarged p { display: flex; justify-content: space-between; margin-top: 1em }
#enlarged a { color: LinkText }
"""
# What screen readers announce, the name of the text field, and pictures that a click enlarges: gradio
# has none of them in a chat.
SCRIPT = """() => {
  document.querySelector("#notice").setAttribute("role", "status");
  document.querySelector("#box textarea").setAttribute("aria-label", "Message");
  const dialog = document.createElement("dialog");
  dialog.id = "enlarged";
  dialog.innerHTML = "<img alt=''><p><a>Download</a> <button>Close</button></p>";
  document.body.append(dialog);
  const [picture, link, close] = dialog.querySelectorAll("img, a, button");
  close.onclick = () => dialog.close();
  document.addEventListener("click", (event) => {
    const shown = event.target.closest("#chat .thumbnail-item")?.querySelector("img");
    if (!shown) return;
    picture.src = link.href = shown.src;
    picture.alt = shown.alt;
    dialog.setAttribute("aria-label", shown.alt);
    link.download = `${shown.alt.replaceAll(" ", "-")}.png`;
    dialog.showModal();
  });
}"""
_POLL = 0.1  # seconds between two looks at a conversation


class _Handlers:
    """What the controls do; `number` is the id of the visitor's conversation."""

    def __init__(self, talks: Conversations):
        self.talks = talks

    async def check_file(self, path: str | None) -> str | None:
        """Accepts files of this page alone, where gradio copies files and URLs that requests name."""
        if path is not None and not self.talks.holds(Path(path)):
            raise gr.Error("that is no upload of this page")
        return path

    async def _watch(self, number: str) -> AsyncIterator[tuple[list[dict], str]]:
        """What to show, whenever it changes, until no answer is in progress."""
        shown = None
        while True:
            now = self.talks.view(number)
            if shown != (shown := (now.changes, now.status)):
                yield _view(now.messages), now.status
            if not now.status:
                return
            await asyncio.sleep(_POLL)

    async def show(self, number):
        number = self.talks.open(number)
        async for shown in self._watch(number):
            yield number, *shown

    async def _answer(self, number, box, start: Callable, *arguments, **settings):
        """Starts an answer and shows it; a refused message is put back into its box."""
        number = self.talks.open(number)
        yield number, _view(self.talks.view(number).messages), "sending …", None
        try:
            await asyncio.to_thread(start, number, *arguments, **settings)
            async for shown in self._watch(number):
                yield number, *shown, gr.skip()
            error = self.talks.view(number).error
        except InputError as refused:
            error = refused
        if error is not None:
            shown = _view(self.talks.view(number).messages)
            yield number, shown, f"**{_sentence(error)}**", box

    async def say(self, number, box, *values):
        content = [box.get("text"), *map(Path, box.get("files") or [])]
        settings = _settings(*values)
        async for shown in self._answer(number, box, self.talks.say, content, **settings):
            yield shown

    async def regenerate(self, number, box, *values):
        async for shown in self._answer(number, box, self.talks.regenerate, **_settings(*values)):
            yield *shown[:3], gr.skip()

    def start_anew(self, number):
        self.talks.forget(number)
        return self.talks.open(None), [], ""

    def attach(self, number, box):
        """The box with the last picture of the conversation, to be edited."""
        messages = self.talks.view(number).messages
        parts = [part for message in messages for part in message["content"]]
        last = [str(part.path) for part in parts if isinstance(part, Picture)][-1:]
        return {"text": box.get("text", ""), "files": [*(box.get("files") or []), *last]}


def make_page(talks: Conversations, title: str) -> gr.Blocks:
    """Builds the page of a model, whose pictures and uploads are in `talks.folder`."""
    does, sampling = _Handlers(talks), talks.model.config.sampling
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        number = gr.BrowserState(None, storage_key="monoformer_conversation")
        # The secret is fixed: a random one would lose the settings when the server starts anew.
        kept = gr.BrowserState(
            None, storage_key=f"monoformer_settings_{talks.model.config.name}", secret="settings"
        )
        gr.Markdown(f"# {title}\nSend text or pictures; the model answers with text or pictures.")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation", show_label=False, render_markdown=False, layout="bubble",
                    buttons=[], feedback_options=None, elem_id="chat", height="60vh",
                    min_height=300,
                )  # fmt: skip
                notice = gr.Markdown(elem_id="notice")
                box = gr.MultimodalTextbox(
                    file_types=["image"], file_count="multiple", label="Message", autofocus=True,
                    show_label=False, placeholder="draw a seven", elem_id="box",
                )  # fmt: skip
                with gr.Row():
                    buttons = [
                        gr.Button(label, size="sm", elem_id=label.split()[0].lower(), min_width=120)
                        for label in ("Stop", "Regenerate", "Attach last picture", "New conversation")
                    ]  # fmt: skip
            with gr.Column(scale=1, min_width=240):
                settings = _make_settings(sampling)
        seen = [number, chat, notice]
        asked = [
            box.submit(does.say, [number, box, *settings], [*seen, box], api_name="say"),
            buttons[1].click(
                does.regenerate, [number, box, *settings], [*seen, box], api_name="regenerate"
            ),
        ]
        buttons[0].click(talks.stop, number, None, api_name="stop")
        buttons[2].click(does.attach, [number, box], box, api_visibility="private")
        gr.on([buttons[3].click, chat.clear], does.start_anew, number, seen, api_name="start_anew",
              cancels=asked)  # fmt: skip
        page.load(does.show, number, seen, api_name="show")
        page.load(
            lambda values: values if values and len(values) == len(settings) else gr.skip(),
            kept, settings, api_visibility="private",
        )  # fmt: skip
        gr.on([control.change for control in settings], None, settings, kept,
              js="(...values) => [values]", api_visibility="private")  # fmt: skip
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = does.check_file
    for event in page.fns.values():
        event.show_progress = "hidden"  # the notice and the growing answer show it
        event.trigger_mode = "multiple"  # otherwise a message during an answer is ignored silently
    # Gradio remembers what it showed to 10,000 sessions; nothing here reads it.
    page.state_session_capacity = 16
    return page.queue(default_concurrency_limit=None)  # `Conversations` has the line


def _make_settings(sampling) -> list[gr.components.Component]:
    """The controls of the settings, in the order of `_settings`."""
    controls = [
        gr.Slider(1, 100, sampling.steps, step=1, label="Steps"),
        gr.Slider(1, 10, sampling.guidance, step=0.1, label="Guidance"),
        gr.Textbox(sampling.negative_prompt, label="Negative prompt", max_lines=3),
        gr.Number(-1, precision=0, minimum=-1, maximum=2**32 - 1, label="Seed (-1: random)"),
        gr.Slider(1, MOST_ANSWERS, 1, step=1, label="Pictures"),
    ]
    with gr.Accordion("More", open=False):
        return [
            *controls,
            gr.Slider(
                1, 10, sampling.image_guidance, step=0.1, label="Guidance of attached pictures"
            ),
            gr.Number(64, precision=0, minimum=1, maximum=MOST_TOKENS, label="Max text tokens"),
            gr.Checkbox(False, label="The model sees earlier messages too"),
        ]


def _settings(steps, guidance, negative, seed, count, image_guidance, most, remember) -> dict:
    """The arguments of `Conversations.say`; gradio has checked the ranges of the numbers."""
    return {
        "steps": int(steps), "guidance": float(guidance), "negative_prompt": negative or "",
        "seed": None if seed in (None, -1) else seed, "count": int(count),
        "image_guidance": float(image_guidance), "max_tokens": 64 if most is None else most,
        "remember": remember,
    }  # fmt: skip


def _view(messages: list[Message]) -> list[dict]:
    """Converts messages for gradio's chatbot: a gallery for pictures that follow each other."""
    shown = []
    for message in messages:
        for kind, group in itertools.groupby(message["content"], type):
            parts = list(group)
            # Gradio would show tags in a text as what they mean, not as they were written.
            texts = [html.escape(part, quote=False) for part in parts if kind is str]
            contents = texts or [_gallery(parts)]
            shown += [{"role": message["role"], "content": content} for content in contents]
    return shown


def _gallery(pictures: list[Picture]) -> gr.Gallery:
    """Pictures that a click enlarges, each with its caption and a download."""
    return gr.Gallery(
        [(str(picture.path), picture.caption) for picture in pictures], show_label=False,
        columns=min(4, len(pictures)), interactive=False, container=False,
    )  # fmt: skip


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + "."
