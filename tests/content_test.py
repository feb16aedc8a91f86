"""Pictures as people give them: every form gives the same pixels; texts stay texts."""

import base64
import io

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from monoformer_jax.data.content import looks_like_image, read_content
from monoformer_jax.errors import InputError

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("my pictures") / "a.png"
    PIL.Image.fromarray(PIXELS).save(path)
    return path


def test_every_form_gives_the_same_pixels(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(file.parent)
    data = file.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for form in (
        file, str(file), "a.png", "./a.png", "~/a.png", data, bytearray(data), memoryview(data),
        io.BytesIO(data), PIL.Image.open(file), PIXELS, jnp.asarray(PIXELS), url,
        url.replace("base64,", "base64,\n"),
        {"type": "image", "image": str(file)},
        {"type": "image", "image": PIXELS},
        {"type": "image_url", "image_url": file},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "input_image", "image_url": url},
    ):  # fmt: skip
        for content in (form, [form], ["what is it? ", form]):
            *texts, picture = read_content(content, "prompt 1")
            assert texts == (["what is it? "] if len(texts) else [])
            np.testing.assert_array_equal(np.asarray(picture), PIXELS, str(form)[:40])


def test_texts_stay_texts():
    for text in ("", "draw a seven", "draw it as in a.png", "a.pngs", "file.txt", "a\nb.png",
                 "x" * 2000 + ".png", "data: a table"):  # fmt: skip
        assert not looks_like_image(text)
        assert read_content(text, "") == read_content([text], "") == [text]
        assert read_content({"type": "text", "text": text}, "") == [text]
    for text in ("a.png", "A.JPG", "dir/a.webp", "../my dir/a.jpeg", "/my dir/a.gif"):
        assert looks_like_image(text)
        for part in ({"type": "text", "text": text}, {"type": "input_text", "text": text}):
            assert read_content([part, "b"], "") == [text, "b"]


def test_a_message_never_opens_a_file_that_its_text_names(file):
    """The text of a chat may come from someone else, who must not read files of this machine."""
    assert read_content(str(file), "message 1", paths=False) == [str(file)]
    with pytest.raises(InputError, match=r"message 1: '.*' looks like the path of an image"):
        read_content([str(file), "what is it?"], "message 1", paths=False)
    with pytest.raises(InputError, match="looks like the path of an image"):
        read_content(["data:image/png;base64,xx"], "message 1", paths=False)
    for part in ({"type": "image", "image": str(file)},
                 {"type": "image_url", "image_url": {"url": str(file)}}):  # fmt: skip
        with pytest.raises(InputError, match="is not a data: URL: nothing is fetched, and a file"):
            read_content([part], "message 1", paths=False)
    with pytest.raises(InputError, match="is not a data: URL"):
        read_content([{"type": "image_url", "image_url": str(file)}], "prompt 1")
    (picture,) = read_content([file], "", paths=False)
    np.testing.assert_array_equal(np.asarray(picture), PIXELS)


def test_urls_are_not_fetched():
    for url in (
        "https://example.org/a.png",
        "http://a/b",
        "file:///etc/passwd.png",
        "ftp://a/b.jpg",
    ):
        for part in (url, {"type": "image", "image": url}):
            if looks_like_image(url) or part is not url:
                with pytest.raises(
                    InputError, match=r"is a URL, '.*': nothing is fetched, download"
                ):
                    read_content([part], "prompt 1")
        with pytest.raises(InputError, match="is not a data: URL: nothing is fetched"):
            read_content([{"type": "image_url", "image_url": {"url": url}}], "prompt 1")
