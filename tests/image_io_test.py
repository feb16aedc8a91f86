"""User images become pixels or raise InputError; generation of many images in shards."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from monoformer_jax.data import image_io
from monoformer_jax.data.image_io import image_grid, open_image, to_pil, to_pixels
from monoformer_jax.errors import InputError
from monoformer_jax.sampling import shards
from monoformer_jax.sampling.shards import generate_shards

RAMP = np.linspace(0, 255, 8 * 8).reshape(8, 8).astype(np.uint8)


def png(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr", "F"])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (50, 9), (3, 96)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_and_size_becomes_pixels(mode, size, channels):
    picture = PIL.Image.new("L", size, 128)
    if mode == "I;16":
        picture = PIL.Image.fromarray(np.full(size[::-1], 128 * 257, np.uint16))
    else:
        picture = picture.convert(mode)
    pixels = to_pixels(open_image(picture), 8, channels)
    assert pixels.shape == (8, 8, channels) and pixels.dtype == np.float32
    wanted = 1.0 if mode == "1" else 1 / 255
    assert np.abs(np.abs(pixels) - wanted).max() < (1.01 if mode == "1" else 0.02)


def test_every_source_type_gives_the_same_pixels(tmp_path):
    plain = to_pixels(open_image(RAMP), 8, 1)
    np.testing.assert_allclose(plain[..., 0], RAMP / 127.5 - 1, atol=1e-6)
    picture = PIL.Image.fromarray(RAMP)
    picture.save(tmp_path / "a.png")
    enlarged = PIL.Image.fromarray(RAMP.repeat(16, 0).repeat(16, 1))
    for source in (picture, str(tmp_path / "a.png"), tmp_path / "a.png", png(picture),
                   io.BytesIO(png(picture)), RAMP[..., None], plain, enlarged):  # fmt: skip
        np.testing.assert_allclose(to_pixels(open_image(source), 8, 1), plain, atol=1e-6)
    np.testing.assert_array_equal(to_pil(plain), RAMP)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixels_of(data):
    picture = open_image(data)
    assert picture.mode == "RGB"
    return np.asarray(picture).tolist()


def test_known_pixels_of_every_kind_of_file():
    """Two pixels side by side; written as a file, read as RGB."""
    clear = PIL.Image.new("RGBA", (2, 1), (*RED, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels_of(png(clear)) == [[list(RED), list(WHITE)]]
    half = PIL.Image.new("LA", (1, 1), (0, 128))
    assert pixels_of(png(half)) == [[[127] * 3]]
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert pixels_of(png(palette)) == [[list(RED), list(BLUE)]]
    assert pixels_of(png(palette, transparency=1)) == [[list(RED), list(WHITE)]]
    deep = PIL.Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert pixels_of(png(deep)) == [[[0] * 3, [255] * 3]]
    assert pixels_of(png(deep, transparency=0)) == [[[255] * 3, [255] * 3]]
    file = io.BytesIO()
    deep.save(file, "tiff")
    assert pixels_of(file.getvalue()) == [[[0] * 3, [255] * 3]]
    file = io.BytesIO()
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "jpeg", quality=100)
    assert pixels_of(file.getvalue())[0][0] == list(RED)


def chunk(name, data):
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def raw_png(width, height, depth, colour, data):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_and_alpha():
    """PIL cannot write these: RGB, then RGBA with a transparent second pixel, 16 bits each."""
    rgb = np.array([65535, 0, 0, 0, 0, 65535], ">u2").tobytes()
    assert pixels_of(raw_png(2, 1, 16, 2, b"\0" + rgb)) == [[list(RED), list(BLUE)]]
    rgba = np.array([65535, 0, 0, 65535, 0, 0, 65535, 0], ">u2").tobytes()
    assert pixels_of(raw_png(2, 1, 16, 6, b"\0" + rgba)) == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize("form", ["gif", "png", "tiff"])
def test_the_first_frame_of_an_animation(form):
    file = io.BytesIO()
    frames = [PIL.Image.new("RGB", (1, 1), colour) for colour in (RED, BLUE)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    assert PIL.Image.open(file).n_frames == 2 and pixels_of(file.getvalue()) == [[list(RED)]]


@pytest.mark.parametrize(
    "orientation, corner", [(1, (0, 0)), (3, (3, 7)), (6, (0, 3)), (8, (7, 0))]
)
def test_the_exif_orientation_is_applied(orientation, corner):
    """The first pixel of 8×4 stored pixels is at the corner that the orientation says."""
    wide = PIL.Image.new("L", (8, 4))
    wide.putpixel((0, 0), 255)
    exif = wide.getexif()
    exif[0x0112] = orientation
    pixels = np.asarray(open_image(png(wide, exif=exif)))
    assert pixels.shape[:2] == ((8, 4) if orientation in (6, 8) else (4, 8))
    assert np.argwhere(pixels[..., 0]).tolist() == [list(corner)]


def test_damaged_exif_data_costs_no_image():
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 4)).save(file, "jpeg", exif=b"Exif\0\0damaged")
    assert open_image(file.getvalue()).size == (8, 4)


def bomb(side):
    """A PNG of a few bytes whose header claims side × side pixels."""
    return raw_png(side, side, 8, 0, bytes(1000))


@pytest.mark.parametrize(
    "source, message",
    [
        (bomb(9000), "is 9000×9000 pixels: over 67 million"),
        (bomb(100_000), "has 10000000000 pixels: over 67 million"),
        (png(PIL.Image.new("1", (3, 4000))), "is 3×4000 pixels: a side is more than 32 times"),
        (np.zeros((40, 1), np.uint8), "is 1×40 pixels: a side is more than 32 times"),
        (bomb(64), "cannot be read as an image"),  # truncated
        (b"", "cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n nothing more", "cannot be read as an image"),
        ("nowhere.png", "there is no file nowhere.png"),
        (None, "cannot be read as an image"),
        (np.zeros((2, 2, 4), np.uint8), "has shape \\(2, 2, 4\\)"),
        (np.zeros((0, 2), np.uint8), "has shape"),
        (np.full((2, 2), np.nan), "neither uint8 nor floats"),
        (np.full((2, 2), 200.0), "neither uint8 nor floats"),
        (np.zeros((2, 2), np.int64), "neither uint8 nor floats"),
    ],
)
def test_unreadable_images_raise_input_error(source, message):
    with pytest.raises(InputError, match=f"my image.*{message}"):
        open_image(source, "my image")


def test_image_grid_places_images_in_order():
    images = [np.full((8, 8, 1), value, np.float32) for value in (-1, 0, 1)]
    grid = np.asarray(image_grid(images, columns=2))
    assert grid.shape == (256, 256)
    assert [grid[y, x] for y, x in ((0, 0), (0, 200), (200, 0), (200, 200))] == [0, 128, 255, 0]
    assert image_io.to_uint8(np.array([-7.0, 7.0])).tolist() == [0, 255]


def paint(first, count):
    numbers = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(numbers[:, None, None, None], (count, 2, 3, 3)).copy()


class Stopped(Exception):
    pass


def test_shards_resume_and_are_divided_among_processes(tmp_path):
    painted = []

    def until(most):
        def run(first, count):
            if len(painted) == most:
                raise Stopped
            painted.append(first)
            return paint(first, count)

        return run

    facts, quiet = {"seed": 1}, {"log": lambda line: None}
    with pytest.raises(Stopped):
        generate_shards(tmp_path, 23, 4, facts, until(2), process=0, processes=2, **quiet)
    assert painted == [0, 8] and not (tmp_path / "samples.npz").exists()
    (tmp_path / ".00000016.npz.1.new").write_bytes(b"truncated by a kill")
    assert (
        generate_shards(tmp_path, 23, 4, facts, until(9), process=0, processes=2, **quiet) is None
    )
    assert painted == [0, 8, 16]
    samples = generate_shards(tmp_path, 23, 4, facts, until(9), process=1, processes=2, **quiet)
    assert painted == [0, 8, 16, 4, 12, 20]
    with np.load(samples) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], paint(0, 23))
    assert generate_shards(tmp_path, 23, 4, facts, until(0), **quiet) == samples
    for changed in ({"seed": 2}, {"seed": 1, "step": 3}):
        with pytest.raises(InputError, match=f"another {list(changed)[-1]}"):
            generate_shards(tmp_path, 23, 4, changed, paint, **quiet)
    with pytest.raises(InputError, match="another total"):
        generate_shards(tmp_path, 24, 4, facts, paint, **quiet)


def test_a_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds mine\.npz but no sampling.json"):
        generate_shards(tmp_path, 4, 2, {}, paint)
    (tmp_path / "mine.npz").unlink()
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(InputError, match=r"sampling\.json is damaged"):
        generate_shards(tmp_path, 4, 2, {}, paint)
    with pytest.raises(InputError, match="--total=0 must be above 0"):
        generate_shards(tmp_path, 0, 2, {}, paint)
    assert shards._file(tmp_path, 128).name == "00000128.npz"
