"""The page: its conversations and their limits, and the page over HTTP through gradio's client."""

import argparse
import concurrent.futures
import dataclasses
import http.client
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from urllib.parse import urlsplit

import gradio_client
import httpx
import jax
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from page_load import talk
from page_model import StandIn

from monoformer_jax import demo
from monoformer_jax.api import Model
from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.data.image_io import open_image
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.nn import clip
from monoformer_jax.page import conversations
from monoformer_jax.page.conversations import Conversations
from monoformer_jax.page.pictures import Picture, describe

SETTINGS = {"seed": 3, "steps": 8}
PATIENCE = 60  # seconds, beside other tests


@pytest.fixture
def talks(config, tmp_path):
    """Conversations whose model goes on when `talks.model.let` is released, 8 times an answer."""
    return Conversations(StandIn(config, let=threading.Semaphore(0)), tmp_path, "digits, step 1400")


def until(true, patience=PATIENCE):
    end = time.monotonic() + patience
    while not (value := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return value


def answered(talks, number):
    """Waits for the end of the answer; everything said so far, and the error."""
    until(lambda: not talks.view(number).status)
    now = talks.view(number)
    return [(message["role"], message["content"]) for message in now.messages], now.error


def pictures_of(view):
    parts = [part for message in view.messages for part in message["content"]]
    return [part for part in parts if isinstance(part, Picture)]


def test_messages_are_answered_in_the_order_of_their_arrival(talks):
    first, second, third = (talks.open(None) for _ in range(3))
    talks.say(first, ["one", None], **SETTINGS)
    talks.say(second, ["two"], **SETTINGS)
    talks.say(third, ["three"], **SETTINGS)
    assert until(lambda: "seed 3" in talks.view(first).status)
    assert talks.view(second).status == "waiting, 1 before you"
    assert talks.view(third).status == "waiting, 2 before you"
    assert talks.view(third).messages == [{"role": "user", "content": ["three"]}]
    with pytest.raises(InputError, match="wait for it"):
        talks.say(first, ["more"], **SETTINGS)
    talks.stop(second)  # the next one moves up
    assert talks.view(third).status == "waiting, 1 before you"
    assert "stopped before" in str(talks.view(second).error)
    talks.model.let.release(16)
    assert answered(talks, first)[0] == [("user", ["one"]), ("assistant", ["one"])]
    assert answered(talks, third)[0] == [("user", ["three"]), ("assistant", ["three"])]
    assert talks.view(second).messages == [] and talks.open(first) == first
    assert talks.open("unknown id") not in ("unknown id", first, second, third)

    talks.model.let.release(8 * 2)
    talks.say(first, ["four"], remember=True, **SETTINGS)
    assert answered(talks, first)[0][-1] == ("assistant", ["one | one | four"])
    talks.say(first, ["/a picture.png"], **SETTINGS)  # a text, whatever it looks like
    assert answered(talks, first)[0][-1] == ("assistant", ["/a picture.png"])
    assert [len(messages) for messages, _ in talks.model.seen] == [1, 1, 3, 1]


def test_stop_keeps_what_is_complete_and_regenerate_replaces(talks):
    number = talks.open(None)
    with pytest.raises(InputError, match="no answer to regenerate"):
        talks.regenerate(number)
    talks.say(number, ["draw a two"], count=3, seed=2**32 - 1, steps=8)
    talks.model.let.release(9)  # one picture, and the first preview of the next
    until(lambda: len(pictures_of(talks.view(number))) == 2)
    assert talks.view(number).status == "answering with seed 0, picture 2 of 3 …"
    talks.stop(number)
    assert talks.view(number).status == "stopping …"
    talks.model.let.release()
    said, error = answered(talks, number)
    (kept,) = said[1][1]
    assert error is None and kept.caption == f"seed {2**32 - 1}" and kept.path.is_file()

    talks.model.let.release(1)
    talks.regenerate(number, steps=8)
    until(lambda: pictures_of(talks.view(number)) and talks.view(number).status)
    talks.stop(number)
    talks.model.let.release()
    said, error = answered(talks, number)  # nothing was complete: the old answer stays
    assert said[1][1] == [kept] and "stopped" in str(error) and kept.path.is_file()

    talks.model.let.release(8 * 3)
    talks.regenerate(number, count=3, seed=7, steps=8)
    said, error = answered(talks, number)
    assert [part.caption for part in said[1][1]] == ["seed 7", "seed 8", "seed 9"]
    assert not error and len(said) == 2
    talks.model.let.release(8)
    talks.say(number, ["hi"], steps=8)  # deletes previews, and pictures that were replaced
    assert answered(talks, number)[1] is None
    assert set(kept.path.parent.iterdir()) == {p.path for p in pictures_of(talks.view(number))}
    assert talks.model.seen[-2][1] == {"max_tokens": 64, "seed": 9, "steps": 8}


def test_random_seeds_differ_and_stand_in_the_pictures(talks):
    talks.model.let.release(8 * 2)
    number = talks.open(None)
    for prompt in ("draw, it: \na", "draw b"):
        talks.say(number, [prompt], steps=8, negative_prompt="gray", guidance=3.5, remember=True)
        assert answered(talks, number)[1] is None
    first, second = pictures_of(talks.view(number))
    assert first.caption != second.caption and re.fullmatch(r"seed \d+", first.caption)
    with PIL.Image.open(first.path) as picture, PIL.Image.open(second.path) as other:
        assert picture.size == (128, 128)  # 8×8, enlarged
        assert picture.text["parameters"] == (
            "draw, it: \na\nNegative prompt: gray\nSteps: 8, Sampler: Heun, CFG scale: 3.5, "
            f"Image CFG scale: 1.0, {first.caption.capitalize().replace(' ', ': ')}, Size: 8x8, "
            'Model: "digits, step 1400", Earlier messages: 0'
        )
        assert other.text["parameters"].endswith("Earlier messages: 2")
    values = {"steps": 1, "solver": "ddim", "guidance": 1, "image_guidance": 1}
    values |= {"negative_prompt": ""}
    text = describe("é", values, seed=1, size=(8, 8), model="m", earlier=0)
    assert text.startswith("é\nSteps: 1, Sampler: Ddim, CFG scale: 1")


def test_new_conversation_frees_everything(talks, tmp_path):
    number, other = talks.open(None), talks.open(None)
    picture = PIL.Image.new("RGB", (64, 32), "white")
    picture.save(tmp_path / "upload.png")
    talks.say(number, ["draw", tmp_path / "upload.png"], **SETTINGS)
    talks.say(other, ["draw"], **SETTINGS)
    talks.model.let.release()
    until(lambda: len(pictures_of(talks.view(number))) == 2)  # the attached one and a preview
    talks.forget(other)  # still waiting
    talks.forget(number)
    assert talks.view(number) == talks.view(other) == ([], "", None, 0)
    talks.model.let.release()
    until(lambda: [path.name for path in tmp_path.iterdir()] == ["upload.png"])
    talks.model.let.release(8)  # the model answers the next one
    number = talks.open(number)
    talks.say(number, ["hi"], **SETTINGS)
    assert answered(talks, number)[0][-1] == ("assistant", ["hi"])


def test_refused_messages_change_nothing(talks, tmp_path, monkeypatch):
    number = talks.open(None)
    talks.model.let.release(8)
    talks.say(number, ["hi"], **SETTINGS)
    before = answered(talks, number)
    broken, drawing = tmp_path / "x.png", tmp_path / "y.png"
    broken.write_text("not an image", encoding="utf-8")
    PIL.Image.new("RGB", (8, 8)).save(drawing, "TIFF")  # Pillow reads it, the page does not
    for content, settings, sentence in (
        ([""], {}, "the message is empty"),
        ([broken], {}, r"the picture x\.png cannot be read as an image"),
        ([drawing], {}, r"the picture y\.png cannot be read as an image"),
        ([tmp_path / "gone.png"], {}, "the upload has expired"),
        ([broken] * 9, {}, "9 pictures: attach 8 at most"),
        (["a" * 20_001], {}, "20001 characters: write 20000 at most"),
        (["\ud83d"], {}, "not Unicode"),
        (["a"], {"negative_prompt": "a" * 20_001}, "the negative prompt has 20001 characters"),
        (["a"], {"seed": -1}, "seed=-1"),
        (["a"], {"count": 9}, "pictures=9 is not between 1 and 8"),
        (["a"], {"max_tokens": 10**9}, "max text tokens=1000000000 is not"),
    ):
        with pytest.raises(InputError, match=sentence) as error:
            talks.say(number, content, **settings)
        assert str(tmp_path) not in str(error.value)
        assert answered(talks, number)[0] == before[0]

    def refuse(*_, **__):
        raise InputError("no room")

    monkeypatch.setattr(talks.model, "chat", refuse)
    talks.say(number, ["a"], **SETTINGS)
    assert answered(talks, number)[0] == before[0]
    assert str(talks.view(number).error) == "no room"
    one = PIL.Image.new("L", (8, 8))
    monkeypatch.setattr(talks.model, "chat", lambda *_, seed, **__: [one] if seed < 5 else refuse())
    talks.say(number, ["a"], count=3, **SETTINGS)
    said, error = answered(talks, number)
    assert len(said[-1][1]) == 2 and str(error) == "no room"  # what is complete stays
    monkeypatch.setattr(talks.model, "chat", lambda *_, **__: 1 / 0)  # a defect of ours
    talks.say(number, ["a"], **SETTINGS)
    assert "the log of the server" in str(answered(talks, number)[1])
    monkeypatch.undo()
    talks.model.let.release(8)
    talks.say(number, ["still there"], **SETTINGS)  # the thread goes on
    assert answered(talks, number)[1] is None


def test_nobody_can_displace_or_fill_what_others_have(talks, monkeypatch):
    talks.model.let.release(8 * 4)
    mine = talks.open(None)
    talks.say(mine, ["draw mine"], **SETTINGS)
    (kept,) = answered(talks, mine)[0][1][1]
    monkeypatch.setattr(conversations, "MOST_CONVERSATIONS", 2)
    for _ in range(10):  # a page that is only looked at takes no room, nor does a refused message
        with pytest.raises(InputError, match="the message is empty"):
            talks.say(talks.open(None), [""], **SETTINGS)
    assert list(talks.folder.iterdir()) == [kept.path.parent]
    talks.say(other := talks.open(None), ["a"], **SETTINGS)
    answered(talks, other)
    with pytest.raises(InputError, match="as many conversations as it holds"):
        talks.say(talks.open(None), ["b"], **SETTINGS)
    assert talks.open(mine) == mine and kept.path.is_file()

    for name, value, sentence in (
        ("MOST_MESSAGES", 2, "this conversation is full"),
        ("MOST_BYTES_EACH", 1, "this conversation is full"),
        ("MOST_BYTES", 1, "the pictures of all visitors"),
        ("MOST_WAITING", 0, "too many people"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(conversations, name, value)
            with pytest.raises(InputError, match=sentence):
                talks.say(mine, ["more"], **SETTINGS)
    upload, old = talks.folder / "upload", time.time() - 3700
    upload.mkdir()
    os.utime(upload, (old, old))
    assert talks.room() > 0 and kept.path.is_file() and not upload.exists()
    monkeypatch.setattr(conversations, "KEPT_SECONDS", -1)
    talks.room()
    assert talks.open(mine) != mine and not list(talks.folder.iterdir())


@pytest.mark.parametrize("mode, size", [("RGB", (600, 301)), ("RGBA", (64, 64)), ("L", (9, 31))])
def test_stored_pictures_are_what_the_model_sees(mode, size, talks, tmp_path):
    """An upload gives the model the same input as its stored crop, bit for bit."""
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], len(mode)), np.uint8)
    upload = tmp_path / "upload.png"
    PIL.Image.fromarray(values.squeeze()).save(upload)
    for channels, side in ((1, 8), (3, 48), (3, 256)):
        layout = dataclasses.replace(talks.model.config.layout, channels=channels)
        processor = talks.model.image_processor = ImageProcessor(layout, side)
        talks.model.let.release(8)
        number = talks.open(None)
        talks.say(number, [upload], **SETTINGS)
        answered(talks, number)
        (stored,) = pictures_of(talks.view(number))
        assert np.array_equal(processor.encode(stored.path).pixels, processor.encode(upload).pixels)
    c = types.SimpleNamespace(image_size=224)
    image = open_image(upload)
    assert clip.crop(image, c).size == (224, 224)
    assert np.array_equal(clip.preprocess(clip.crop(image, c), c), clip.preprocess(image, c))


def test_passwords_and_hosts(tmp_path):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)

    def password(*arguments):
        return demo._password(parser.parse_args(["--workdir=x", *arguments]))

    file = tmp_path / "password"
    file.write_text("correct horse\n", encoding="utf-8")
    assert password() is password("--host=127.0.0.2") is password("--host=localhost") is None
    assert len(password("--host=0.0.0.0")) == len(password("--share=true")) == 16
    assert password("--host=lab") != password("--host=lab")
    assert password("--host=0.0.0.0", "--password=none") is None
    assert password(f"--password={file}") == "correct horse"
    file.write_text("short", encoding="utf-8")
    for value, sentence in ((file, "holds 5 characters"), (tmp_path / "no", "no such file")):
        with pytest.raises(InputError, match=sentence):
            password(f"--password={value}")


@pytest.fixture(scope="module")
def served(config):
    """URL of a page, and its model."""
    model = StandIn(config, seconds=0.02)
    with demo.serve(model, "digits, step 1400") as (address, public):
        assert public is None
        yield address, model


def request(address, method="GET", path="/", body=b"", text=True, **headers):
    """Status, headers and text of an answer to exactly these headers."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    length = {"Content-Length": str(len(body))} if method != "GET" else {}
    for name, value in ({"Host": urlsplit(address).netloc} | length | named).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    with connection.getresponse() as answer:
        return answer.status, answer.headers, answer.read().decode() if text else answer.read()


def test_other_sites_and_other_names_are_refused(served):
    address, model = served
    host = urlsplit(address).netloc
    join = {"path": "/gradio_api/queue/join", "method": "POST", "body": b"{}"}
    as_json = {"Content_Type": "application/json"}
    before = len(model.seen)
    for arguments, status in (
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "evil.example"}, 403),  # a name of theirs that resolves to 127.0.0.1
        ({"Host": f"evil.example:{host.split(':')[1]}"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": f"http://{host}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost"}, 403),  # another page of this machine
        ({"Origin": "null"}, 403),
        (join | as_json | {"Origin": "http://evil.example"}, 403),
        (join | {"Content_Type": "text/plain", "Origin": "null"}, 403),
        (join | as_json | {"Sec_Fetch_Site": "cross-site"}, 403),
        (join | as_json | {"Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}, 422),
        (join | as_json, 422),  # reaches gradio, which misses the fields of the body
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),  # a link
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),  # an <img>
        ({"method": "OPTIONS", "Origin": "http://evil.example",
          "Access_Control_Request_Method": "POST"}, 403),
        (join | {"Content_Length": None}, 411),
        (join | as_json | {"Content_Length": str(2**20 + 1)}, 413),
        (join | {"path": "/gradio_api/upload", "Content_Length": str(2**31)}, 413),
        ({"path": "/monitoring"}, 404),
        ({"path": "/gradio_api/proxy=http://127.0.0.1/"}, 404),
        (join | {"path": "/gradio_api/vibe-edit/"}, 404),
        (join | {"path": "/gradio_api/component_server"}, 404),
        ({"path": "/gradio_api/file=/etc/passwd"}, 403),
        ({"path": f"/gradio_api/file={os.environ['GRADIO_TEMP_DIR']}/../../etc/passwd"}, 403),
    ):  # fmt: skip
        got, headers, _ = request(address, **arguments)
        assert got == status, arguments
        assert not [name for name in headers if name.lower().startswith("access-control")]
        policy = headers["Content-Security-Policy"]
        for part in ("default-src 'self'", "frame-ancestors 'none'", "base-uri 'self'",
                     "form-action 'self'", "object-src 'none'"):  # fmt: skip
            assert part in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert len(model.seen) == before
    _, _, html = request(address)
    loaded = re.findall(r"<(?:link|script|img)\b[^>]*(?:href|src)=\"(https?:)?//([^/\"]+)", html)
    assert {place for _, place in loaded} <= {host}


def test_uploads_are_bounded_and_no_other_file_can_be_named(served, monkeypatch, tmp_path):
    address, model = served
    with httpx.Client(base_url=f"{address}gradio_api/", timeout=PATIENCE) as client:
        for size, room, status in ((20 << 20, 1, 200), ((20 << 20) + 1, 1, 413), (10, 0, 507)):
            with monkeypatch.context() as patch:
                patch.setattr(conversations, "MOST_BYTES", room << 30)
                answer = client.post("upload", files={"files": ("a.png", bytes(size))})
            assert answer.status_code == status
        before = len(model.seen)
        PIL.Image.new("L", (8, 8)).save(tmp_path / "secret.png")
        folder = os.environ["GRADIO_TEMP_DIR"]
        above = os.path.join(folder, os.path.relpath(tmp_path / "secret.png", folder))
        for path in ("/etc/hostname", str(tmp_path / "secret.png"), above, f"{address}favicon.ico",
                     "http://a/b.png"):  # fmt: skip
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            for number, attached in ((None, [file]), (file, [])):
                data = [number, {"text": "a", "files": attached}, *SAY.values()]
                event = client.post("call/say", json={"data": data}).json()["event_id"]
                said = client.get(f"call/say/{event}").text
                assert "event: error" in said and "no upload of this page" in said, said
        assert len(model.seen) == before and not list(Path(folder).glob("*/secret.png"))


SAY = {"steps": 8, "guidance": 2, "negative": "", "seed": 3, "count": 1, "image_guidance": 1,
       "most": 64, "remember": False}  # fmt: skip


def say(client, number, text, *files, **settings):
    message = {"text": text, "files": [gradio_client.handle_file(file) for file in files]}
    return client.submit(number, message, *(SAY | settings).values(), api_name="/say")


def galleries(shown):
    """[(file, caption)] of each gallery."""
    parts = [part for message in shown for part in message["content"]]
    return [
        [(item["image"], item["caption"]) for item in part["value"]]
        for part in parts
        if part["type"] == "component"
    ]


def test_page_draws_takes_pictures_and_survives_a_reload(served, monkeypatch):
    address, model = served
    monkeypatch.setattr(model, "seconds", 0.05)  # time for previews
    client = gradio_client.Client(address, verbose=False)
    number, shown, _ = client.predict(None, api_name="/show")
    assert shown == []
    job = say(client, number, "draw a one", count=2)
    number, shown, notice, _ = job.result()
    steps = job.outputs()
    assert shown[0]["content"][0]["text"] == "draw a one" and notice == ""
    assert len({path for _, now, *_ in steps for g in galleries(now) for path, _ in g}) > 2
    ((first, caption), (_, other)) = galleries(shown)[0]
    assert (caption, other) == ("seed 3", "seed 4")
    with PIL.Image.open(first) as picture:  # as it was downloaded
        assert picture.size == (128, 128) and "Seed: 3," in picture.text["parameters"]

    _, shown, *_ = say(client, number, "read this: ", first).result()
    assert galleries(shown)[1][0][1] == "attached picture"
    assert shown[-1]["content"][0]["text"] == "read this:  | picture of 128"
    *_, notice, box = say(client, number, "x" * 20_001).result()
    assert notice.startswith("**The message has 20001") and box["text"] == "x" * 20_001
    *_, notice, box = say(client, number, "").result()
    assert notice.startswith("**The message is empty")

    again = gradio_client.Client(address, verbose=False)  # the page is reloaded
    _, reloaded, _ = again.predict(number, api_name="/show")
    assert len(galleries(reloaded)) == 2
    (folder,) = {
        Path(path).parent for path in Path(os.environ["GRADIO_TEMP_DIR"]).glob("tmp*/picture*")
    }
    assert (
        stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    )
    path = next(folder.iterdir())
    status, headers, _ = request(address, path=f"/gradio_api/file={path}", text=False)
    assert status == 200 and headers["Cache-Control"] == "private, no-store"
    assert again.predict(number, api_name="/start_anew")[1] == []
    assert client.predict(number, api_name="/show")[1] == []
    assert not folder.exists()


def test_the_ninth_visitor_sees_the_line_at_once(served, monkeypatch):
    address, model = served
    client = gradio_client.Client(address, verbose=False)
    with monkeypatch.context() as patch:
        patch.setattr(model, "let", threading.Semaphore(0))  # no answer ends
        waiting = [say(client, None, f"say {person}") for person in range(8)]
        until(lambda: all(job.outputs() for job in waiting))
        for person in range(8, 11):
            job = say(client, None, f"say {person}")
            until(lambda job=job: job.outputs() and "waiting" in job.outputs()[-1][2])
            waiting.append(job)
        places = [job.outputs()[-1][2] for job in waiting]
        assert {place for place in places if "waiting" in place} == {
            f"waiting, {before} before you" for before in range(1, 11)
        }
        model.let.release(8)  # everybody sees that the line has moved
        until(lambda: "waiting, 9 before you" in waiting[-1].outputs()[-1][2])
        model.let.release(8 * 10)
        answers = [[m["content"][0]["text"] for m in job.result()[1]] for job in waiting]
    assert answers == [[f"say {person}"] * 2 for person in range(11)]  # none is mixed up


def test_no_conversation_is_mixed_up_or_lost(served, monkeypatch):
    """page_load.py does this 500 times, with 300 large pictures, and measures."""
    address, model = served
    monkeypatch.setattr(model, "seconds", 0)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda person: talk(address, person, turns=5), range(5)))
    assert [wrong for wrong, _ in found] == [[]] * 5
    assert [len(seconds) for _, seconds in found] == [5] * 5


def test_a_shared_page_asks_for_a_password(config, monkeypatch):
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *_: "http://abc.gradio.live")
    with demo.serve(StandIn(config), "m", share=True, password="correct horse") as (
        address,
        public,
    ):
        assert public == "https://abc.gradio.live"
        for host in ({}, {"Host": "abc.gradio.live", "Origin": "https://abc.gradio.live"}):
            assert request(address, **host)[0] == 200  # the form of the password
            for path in ("/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a"):
                assert request(address, path=path, **host)[0] == 401
            join = {"method": "POST", "Content_Type": "application/json", "body": b"{}"}
            for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/call/show"):
                assert request(address, path=path, **join, **host)[0] == 401
        assert re.search(r'"auth_required": ?true.*"components": ?\[\]', request(address)[2])
        with pytest.raises(Exception, match=r"Could not login|credentials"):
            gradio_client.Client(address, auth=(demo.USER, "wrong"), verbose=False)
        client = gradio_client.Client(address, auth=(demo.USER, "correct horse"), verbose=False)
        assert client.predict(None, api_name="/show")[1] == []

        def refuse(*_):
            raise RuntimeError("no network")

        monkeypatch.setattr("gradio.networking.setup_tunnel", refuse)
        with (
            pytest.raises(InputError, match="no public address: no network"),
            demo.serve(StandIn(config), "m", share=True),
        ):
            pass
        port = int(urlsplit(address).port)
        with (
            pytest.raises(InputError, match=f"--port={port} cannot be served: Address already"),
            demo.serve(StandIn(config), "m", port=port),
        ):
            pass


@pytest.mark.slow
def test_a_real_model_answers_and_refuses(config):
    """With a model that either draws or ends its answer."""
    params = monoformer.init(config.model, jax.random.key(3))
    opposite = 6 * params["text_head"][:, 0]
    head = params["text_head"].at[:, ByteTokenizer.im_start_id].set(opposite)
    params["text_head"] = head.at[:, ByteTokenizer.eos_id].set(-opposite)
    processor = ImageProcessor(config.layout, config.data.image_size)
    model = Model(config, params, ByteTokenizer(), image_processor=processor)
    with demo.serve(model, "tiny") as (address, _):
        client = gradio_client.Client(address, verbose=False)
        job = say(client, None, "draw a one", steps=16)
        number, shown, notice, _ = job.result()
        drawn = {path for _, now, *_ in job.outputs() for g in galleries(now) for path, _ in g}
        assert len(drawn) >= 2 and notice == ""  # a preview, and the picture
        with PIL.Image.open(galleries(shown)[0][0][0]) as picture:
            assert "Steps: 16, Sampler: Heun, CFG scale: 2.0" in picture.text["parameters"]
            seen = np.asarray(picture)[::16, ::16]
        again = model.chat([{"role": "user", "content": "draw a one"}], seed=3, steps=16)
        again = next(part for part in again if not isinstance(part, str))
        assert np.array_equal(seen, np.asarray(again))  # what the file says makes it again
        _, after, notice, box = say(client, number, "x" * 500).result()
        assert len(after) == len(shown) and box["text"] == "x" * 500
        assert re.search(r"\*\*The conversation .* 501 tokens, .* context is 160 .*\.\*\*", notice)


@pytest.mark.slow
def test_the_command_prints_its_password_and_deletes_its_pictures(tmp_path):
    code = """if True:
        import monoformer_jax, page_model
        from monoformer_jax import demo
        from monoformer_jax.cli import load_config, run_command
        config = load_config("configs/digits.py:tiny", [])
        monoformer_jax.load = lambda *_, **__: page_model.StandIn(config)
        run_command("demo", demo.__doc__, demo.add_arguments, demo.main)
    """
    command = [sys.executable, "-c", code, "--workdir=x", "--port=0", "--host=0.0.0.0"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env=environment) as process:  # fmt: skip
        lines = [process.stdout.readline() for _ in range(2)]
        port = re.fullmatch(r"serving http://0\.0\.0\.0:(\d+)/\n", lines[0])[1]
        password = re.fullmatch(r"user guest, password (\S{16})\n", lines[1])[1]
        address = f"http://127.0.0.1:{port}/"
        client = gradio_client.Client(address, auth=("guest", password), verbose=False)
        say(client, None, "draw a one").result()
        assert list(tmp_path.glob("monoformer_page_*/*/picture*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert not list(tmp_path.glob("monoformer_page_*"))
