"""The demo: its conversations, and its page over HTTP through gradio's client."""

import re
import socket
import sys
import threading
import types
import urllib.request

import gradio
import gradio_client
import jax
import PIL.Image
import pytest

from monoformer_jax import demo
from monoformer_jax.api import Model
from monoformer_jax.cli import run_command
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer


class FakeModel:
    """Fake model whose `chat` advances one step whenever `let` is released."""

    def __init__(self):
        self.let, self.seen = threading.Semaphore(0), []

    def chat(self, messages, *, preview, every, **settings):
        self.seen.append((messages, settings))
        for step in range(2):
            self.let.acquire()
            preview(step, [f"step {step}"])
        self.let.acquire()
        return ["done"]


SETTINGS = {"remember": True, "max_tokens": 8, "seed": 3, "steps": 16}


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_answer_continues_after_the_page_is_closed():
    model = FakeModel()
    talks = demo.Conversations(model)
    number = talks.open(None)
    first = talks.say(number, ["draw", None], **SETTINGS)
    assert said(next(first)[0]) == [("user", ["draw"])]
    first.close()  # the page was closed
    with pytest.raises(InputError, match="wait for it"):
        next(talks.say(number, ["more"], **SETTINGS))
    again = talks.watch(talks.open(number))
    assert next(again) == ([{"role": "user", "content": ["draw"]}], True)
    for step in range(2):
        model.let.release()
        messages, under_way = next(again)
        assert under_way and messages[-1]["content"] == [f"step {step}"]
    model.let.release()
    messages, under_way = next(again)
    assert said(messages) == [("user", ["draw"]), ("assistant", ["done"])] and not under_way
    assert model.seen[0][1] == {"max_tokens": 8, "seed": 3, "steps": 16}

    model.let.release(3)
    *_, (messages, _) = talks.say(number, ["more"], **SETTINGS)
    assert said(model.seen[1][0]) == [
        ("user", ["draw"]),
        ("assistant", ["done"]),
        ("user", ["more"]),
    ]
    model.let.release(3)
    list(talks.say(number, ["again"], **SETTINGS | {"remember": False}))
    assert said(model.seen[2][0]) == [("user", ["again"])]
    assert len(next(talks.watch(number))[0]) == 6


def test_new_conversation_cancels_the_answer():
    model = FakeModel()
    talks = demo.Conversations(model)
    number, other = talks.open(None), talks.open("unknown id")
    assert number != other != "unknown id"
    watched = talks.say(number, ["draw"], **SETTINGS)
    next(watched)
    talks.forget(number)
    model.let.release()
    assert list(watched) == [([], False)]  # cancelled at its first preview
    assert list(talks.watch(number)) == [([], False)]
    model.let.release(3)  # the model lock is released for the next answer
    *_, (messages, _) = talks.say(other, ["draw"], **SETTINGS)
    assert messages[-1]["content"] == ["done"]


def test_errors_leave_the_conversation_unchanged(tmp_path):
    def refuse(*_, **__):
        raise InputError("no")

    talks = demo.Conversations(types.SimpleNamespace(chat=refuse))
    number = talks.open(None)
    broken = tmp_path / "x.png"
    broken.write_text("not an image")
    for content, sentence in (
        ([""], "the message is empty"),
        ([broken], "cannot be read as an image"),
        (["a"], "no"),
    ):
        with pytest.raises(InputError, match=sentence):
            list(talks.say(number, content, **SETTINGS))
        assert list(talks.watch(number)) == [([], False)]


def test_untrained_workdir_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        run_command("demo", demo.__doc__, demo.add_arguments, demo.main)
    assert stopped.value.code == 2
    assert "holds no trained model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address(config):
    """URL of a page whose model either generates an image or ends its answer."""
    params = monoformer.init(config.model, jax.random.key(3))
    opposite = 6 * params["text_head"][:, 0]
    head = params["text_head"].at[:, ByteTokenizer.im_start_id].set(opposite)
    params["text_head"] = head.at[:, ByteTokenizer.eos_id].set(-opposite)
    model = Model(
        config,
        params,
        ByteTokenizer(),
        image_processor=ImageProcessor(config.layout, config.data.image_size),
    )
    page = demo.make_page(model, "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield demo.serve(page, port, wait=False)
    page.close()


def pictures(shown):
    parts = [part for message in shown for part in message["content"]]
    return [part["value"] for part in parts if part["type"] == "component"]


@pytest.mark.slow
def test_page_generates_takes_images_and_survives_a_reload(address, tmp_path):
    client = gradio_client.Client(address, verbose=False)
    number, shown, _ = client.predict(None, api_name="/show")
    assert shown == []

    def say(text, *files):
        message = {"text": text, "files": [gradio_client.handle_file(file) for file in files]}
        job = client.submit(number, message, False, 64, 2.0, 0, 16, api_name="/say")
        return job.result(), job.outputs()

    (_, shown, notice, box), steps = say("draw a one")
    assert shown[0]["content"][0]["text"] == "draw a one" and notice == "" and not box["text"]
    assert len({path for _, now, *_ in steps for path in pictures(now)}) >= 2  # a preview
    with PIL.Image.open(pictures(shown)[0]) as picture:
        assert picture.size == (128, 128)
        picture.save(tmp_path / "seen.png")

    (_, shown, *_), _ = say("read this: ", tmp_path / "seen.png")
    spoken = [part.get("text") for message in shown for part in message["content"]]
    assert "read this: " in spoken and pictures(shown[spoken.index("read this: ") :])

    (_, after, notice, box), _ = say("x" * 500)
    assert len(after) == len(shown) and box["text"] == "x" * 500
    assert (
        re.search(r"\*\*The conversation .* 501 tokens, .* context is 160 .*\.\*\*", notice)
        and "Traceback" not in notice
    )

    again = gradio_client.Client(address, verbose=False)  # the page is reloaded
    _, reloaded, _ = again.predict(number, api_name="/show")
    assert [len(m["content"]) for m in reloaded] == [len(m["content"]) for m in after]
    assert len(pictures(reloaded)) == len(pictures(after))
    assert again.predict(number, api_name="/start_anew")[1] == []
    assert client.predict(number, api_name="/show")[1] == []


@pytest.mark.slow
def test_page_makes_no_external_requests(address):
    with urllib.request.urlopen(address) as answer:
        html, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    loaded = re.findall(r"<(?:link|script|img)\b[^>]*(?:href|src)=\"(https?:)?//([^/\"]+)", html)
    assert {host for _, host in loaded} <= {address.split("/")[2]}
    with gradio.Blocks() as page:
        pass
    with pytest.raises(InputError, match="cannot be served"):
        demo.serve(page, int(address.split(":")[2].strip("/")), wait=False)
