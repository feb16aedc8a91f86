"""Conversations of all visitors, and the line in which their messages wait for the model."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import secrets
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from monoformer_jax.data.content import looks_like_image
from monoformer_jax.data.image_io import open_image
from monoformer_jax.errors import InputError, require
from monoformer_jax.page.pictures import Picture, describe, folder_bytes, save_picture
from monoformer_jax.page.settings import check_settings, check_text

MOST_CONVERSATIONS = 500
MOST_MESSAGES = 200  # of a conversation
MOST_WAITING = 64  # messages in line, with the one that is answered
MOST_ATTACHED = 8  # pictures of a message
MOST_BYTES = 1 << 30  # of all pictures, with uploads that are not sent yet
MOST_BYTES_EACH = 1 << 26  # of the pictures of a conversation
KEPT_SECONDS = 24 * 3600  # after the last message
UPLOAD_SECONDS = 3600  # in which an upload must be sent
_PREVIEWS = 8  # per picture, about
# Pillow also reads formats that only attacks upload, some of them by starting another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# From 32 MiB on, what is freed returns to the system at once; smaller blocks stay with their thread, a
# gigabyte after a few large pictures.
PIL.Image.core.set_block_size(1 << 26)

Message = dict[str, Any]  # {"role": "user" or "assistant", "content": [texts and `Picture`s]}


class View(NamedTuple):
    """What a page shows of a conversation.

    Attributes:
      messages: all, with the answer so far.
      status: what the answer in progress waits for or does; "" without one.
      error: why the last message has no complete answer.
      changes: counts changes of the other attributes, but of `status`.
    """

    messages: list[Message]
    status: str
    error: InputError | None
    changes: int


@dataclasses.dataclass(eq=False)
class _Conversation:
    folder: Path
    messages: list[Message] = dataclasses.field(default_factory=list)
    asked: list[Message] | None = None  # the messages to answer; None: no answer is in progress
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    answer: list[str | Picture] = dataclasses.field(default_factory=list)  # so far
    status: str = ""
    error: InputError | None = None
    stopped: bool = False
    cleared: bool = False
    changes: int = 0
    used: float = dataclasses.field(default_factory=time.time)

    def show(self, answer: list[str | Picture]) -> None:
        self.answer, self.changes = answer, self.changes + 1

    def begin(self) -> None:
        """Marks the conversation as in progress, and deletes what the last answer left.

        That is previews and pictures of replaced answers; at its end, pages still loaded them.
        """
        self.asked, self.answer, self.error, self.stopped = self.messages, [], None, False
        self.status = "reading the message …"
        parts = [part for message in self.messages for part in message["content"]]
        kept = {part.path for part in parts if isinstance(part, Picture)}
        for path in self.folder.iterdir():
            if path not in kept:
                path.unlink()

    def end(self, messages: list[Message], error: InputError | None) -> None:
        self.messages, self.error, self.asked, self.answer = messages, error, None, []
        self.used, self.changes = time.time(), self.changes + 1


class _Stopped(Exception):
    """The visitor stopped the answer, or cleared the conversation."""


class Conversations:
    """Every conversation, by an id that only its visitor has; the page only displays them.

    Messages are answered one at a time in the order of their arrival, in a background thread, so that
    an answer is completed when the page is closed or reloaded. Texts are in memory and pictures in
    files, as the model sees them. Conversations are kept for `KEPT_SECONDS` after their last message;
    new ones never displace them.
    """

    def __init__(self, model, folder: Path, name: str):
        """Args:
        model: see `monoformer_jax.Model`.
        folder: of the pictures; nobody else writes there but the uploads of the page.
        name: of the model, for the metadata of pictures.
        """
        self.model, self.folder, self.name = model, folder, name
        self._all: dict[str, _Conversation] = {}
        self._line: list[_Conversation] = []  # the first is being answered
        self._working = False
        self._lock = threading.Lock()  # of the three above
        # One picture is decoded at a time, and in one thread: each thread's heap keeps what it freed.
        self._reading = concurrent.futures.ThreadPoolExecutor(1)
        self._numbers = itertools.count(1)

    def open(self, number: str | None) -> str:
        """Returns the id `number` if such a conversation exists, else a new id."""
        return number if number in self._all else secrets.token_urlsafe(16)

    def view(self, number: str) -> View:
        """What to show now."""
        with self._lock:
            if (talk := self._all.get(number)) is None:
                return View([], "", None, 0)
            if talk.asked is None:
                return View(talk.messages, "", talk.error, talk.changes)
            before = self._line.index(talk) if talk in self._line else 0
            status = f"waiting, {before} before you" if before else talk.status
            answer = [{"role": "assistant", "content": talk.answer}] if talk.answer else []
            return View([*talk.asked, *answer], status, None, talk.changes)

    def say(self, number: str, content: Sequence[str | Path], **settings: Any) -> None:
        """Puts a user message in line for an answer.

        Args:
          content: texts, and files of pictures.
          settings: see `check_settings`.

        Raises:
          InputError: an empty message, a picture that cannot be read, a limit of this module, or the
            previous answer is not complete. The conversation is unchanged then. Errors of `Model.chat`
            end the answer and are in `view`.
        """
        settings = check_settings(**settings)
        talk = self._begin(number)
        asked = None
        try:
            require(
                len(talk.messages) < MOST_MESSAGES and folder_bytes(talk.folder) < MOST_BYTES_EACH,
                "this conversation is full: begin a new one",
            )
            require(
                self.room() > 0,
                "the pictures of all visitors fill the space of this page: try again later",
            )
            message = {"role": "user", "content": self._read(talk, content)}
            asked = [*talk.messages, message]
        finally:
            self._join(talk, asked, settings)

    def regenerate(self, number: str, **settings: Any) -> None:
        """Answers the last user message again; the new answer replaces the old one.

        Raises:
          InputError: there is no answer, or see `say`.
        """
        settings = check_settings(**settings)
        require(bool(self.view(number).messages), "there is no answer to regenerate")
        talk = self._begin(number)
        self._join(talk, talk.messages[:-1], settings)

    def stop(self, number: str) -> None:
        """Ends an answer in progress; texts and pictures that are complete stay."""
        with self._lock:
            if (talk := self._all.get(number)) is not None and talk.asked is not None:
                talk.stopped = True
                talk.status = "stopping …"
                self._leave(talk)

    def forget(self, number: str) -> None:
        """Deletes the conversation with its pictures; an answer in progress is stopped."""
        with self._lock:
            if (talk := self._all.pop(number, None)) is not None:
                self._clear(talk)

    def holds(self, path: Path) -> bool:
        """Whether a path is below `folder`."""
        return path.resolve().is_relative_to(self.folder.resolve())

    def room(self) -> int:
        """Bytes left for pictures, after deleting what has expired."""
        now = time.time()
        with self._lock:
            for old in [n for n, talk in self._all.items() if now - talk.used > KEPT_SECONDS]:
                if self._all[old].asked is None:
                    self._clear(self._all.pop(old))
            ours = {talk.folder for talk in self._all.values()}
            for upload in set(self.folder.iterdir()) - ours:
                if now - upload.stat().st_mtime > UPLOAD_SECONDS:
                    shutil.rmtree(upload, ignore_errors=True)
        return MOST_BYTES - folder_bytes(self.folder)

    def _clear(self, talk: _Conversation) -> None:
        talk.stopped = talk.cleared = True
        self._leave(talk)
        if talk.asked is None:  # otherwise `_join` or `_answer` still write into it
            shutil.rmtree(talk.folder)

    def _leave(self, talk: _Conversation) -> None:
        """Takes a conversation that is not answered yet out of the line."""
        if talk in self._line[1:]:
            self._line.remove(talk)
            talk.end(talk.messages, InputError("stopped before the answer began"))

    def _begin(self, number: str) -> _Conversation:
        """The conversation, new if it has no message yet, marked as in progress."""
        with self._lock:
            require(
                len(self._line) < MOST_WAITING, "too many people wait for answers: try again later"
            )
            if number not in self._all:
                require(
                    len(self._all) < MOST_CONVERSATIONS,
                    "this page has as many conversations as it holds: try again later",
                )
                folder = Path(tempfile.mkdtemp(dir=self.folder))  # only this user can read it
                self._all[number] = _Conversation(folder)
            talk = self._all[number]
            require(talk.asked is None, "the previous answer is not complete: wait for it")
            talk.begin()
            return talk

    def _join(self, talk: _Conversation, asked: list[Message] | None, settings: dict) -> None:
        """Puts a conversation in line; without `asked` its message was refused."""
        with self._lock:
            if asked is None or talk.stopped:
                talk.end(talk.messages, None)
                if talk.cleared or not talk.messages:  # a refused first message takes no room
                    self._all = {n: other for n, other in self._all.items() if other is not talk}
                    shutil.rmtree(talk.folder)
                require(asked is None, "stopped before the answer began")
                return
            talk.asked, talk.settings, talk.status = asked, settings, "answering …"
            talk.changes += 1
            self._line.append(talk)
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, daemon=True).start()

    def _read(self, talk: _Conversation, content: Sequence[str | Path]) -> list[str | Picture]:
        content = [part for part in content if part]
        require(bool(content), "the message is empty: write text or attach a picture")
        attached = sum(not isinstance(part, str) for part in content)
        require(
            attached <= MOST_ATTACHED,
            f"the message has {attached} pictures: attach {MOST_ATTACHED} at most",
        )
        for text in content:
            if isinstance(text, str):
                check_text(text, "the message")
        return [
            part if isinstance(part, str) else self._reading.submit(self._crop, talk, part).result()
            for part in content
        ]

    def _crop(self, talk: _Conversation, upload: Path) -> Picture:
        """Stores what the model sees of a picture: the upload may be a thousand times larger."""
        require(not talk.stopped, "stopped before the answer began")
        require(
            self.holds(upload) and upload.is_file(),
            "the upload has expired: attach the picture again",
        )
        with upload.open("rb") as file:  # by its path, messages would show our folders
            picture = open_image(file, f"the picture {upload.name}", formats=_FORMATS)
        picture = self.model.image_processor.crop(picture)
        return self._store(talk, picture, "attached picture")

    def _store(
        self, talk: _Conversation, image: PIL.Image.Image, caption: str, parameters: str = ""
    ) -> Picture:
        path = talk.folder / f"picture-{next(self._numbers):06}.png"
        save_picture(path, image, parameters)
        return Picture(path, caption)

    def _work(self) -> None:
        """Answers until the line is empty."""
        while True:
            with self._lock:
                if not self._line:
                    self._working = False
                    return
                talk = self._line[0]
            messages, error = self._answer(talk)
            with self._lock:
                self._line.remove(talk)
                talk.end(messages, error)
                if talk.cleared:
                    shutil.rmtree(talk.folder)

    def _answer(self, talk: _Conversation) -> tuple[list[Message], InputError | None]:
        """The messages after the answer, and what went wrong."""
        done: list[str | Picture] = []
        error = None
        try:
            self._generate(talk, done)
            require(bool(done), "the model gave an empty answer")
        except _Stopped:
            if not done:
                error = InputError("stopped before a text or a picture was complete")
        except InputError as refused:
            error = refused
        except Exception:  # one message must not end the thread that answers all of them
            traceback.print_exc()
            error = InputError("the answer failed: the log of the server says why")
        answer = [*talk.asked, {"role": "assistant", "content": done}]
        return answer if done else talk.messages, error

    def _generate(self, talk: _Conversation, done: list[str | Picture]) -> None:
        """Appends the answers of a message to `done`, each with the next seed."""
        settings = dict(talk.settings)
        remember, count, first = (settings.pop(key) for key in ("remember", "count", "seed"))
        context = talk.asked if remember else talk.asked[-1:]
        asked = [message | {"content": _for_chat(message["content"])} for message in context]
        prompt = " ".join(part for part in context[-1]["content"] if isinstance(part, str))
        sampling = dataclasses.asdict(self.model.config.sampling)
        sampling |= {key: value for key, value in settings.items() if key in sampling}
        for nth in range(count):
            seed = (first + nth) % 2**32
            of = f", picture {nth + 1} of {count}" if count > 1 else ""
            talk.status = f"answering with seed {seed}{of} …"

            def stored(parts, nth=nth, seed=seed):
                # The text before the first picture does not depend on the seed: shown once.
                parts = parts[1:] if nth and parts and isinstance(parts[0], str) else parts
                return [
                    part
                    if isinstance(part, str)
                    else self._store(talk, part, f"seed {seed}", describe(
                        prompt, sampling, seed=seed, size=part.size, model=self.name,
                        earlier=len(context) - 1,
                    ))
                    for part in parts
                ]  # fmt: skip

            def preview(step, parts, stored=stored):
                if talk.stopped:
                    done.extend(stored(parts[:-1]))  # the last one is not complete
                    raise _Stopped
                talk.show([*done, *stored(parts)])

            every = max(1, sampling["steps"] // _PREVIEWS)
            answer = stored(
                self.model.chat(asked, preview=preview, every=every, seed=seed, **settings)
            )
            done.extend(answer)
            talk.show(list(done))
            if talk.stopped or not any(isinstance(part, Picture) for part in answer):
                return


def _for_chat(content: Sequence[str | Picture]) -> list:
    """Marks what a person wrote as a text where `Model.chat` would take it for a path."""
    parts = [part.path if isinstance(part, Picture) else part for part in content]
    return [
        {"type": "text", "text": part} if isinstance(part, str) and looks_like_image(part) else part
        for part in parts
    ]
