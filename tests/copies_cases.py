"""A page with two images and its noised copies, beside the page cut right after each image."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import merge, row_masks
from monoformer_jax.batch import PATCH
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.packing import Pack
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.models import monoformer

# Head dim 64, which every kernel takes.
MODEL = monoformer.MonoFormerConfig(num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=1,
                                    head_dim=64, mlp_dim=64, dtype="float32", remat="none")  # fmt: skip
LAYOUT = dataclasses.replace(MODEL.layout, noised_copies=True)
SIZES = ((8, 8), (12, 8))  # pixels of the images; one is not square
LENGTH = 256  # several blocks of every kernel
TIMES = (0.9, 0.6)
TOKENIZER = ByteTokenizer()


def page(count: int = 2, end: tuple = (" and so on",)) -> list:
    """The parts of a page up to image `count`, and its end."""
    rng = np.random.default_rng(0)
    images = [Image(rng.normal(size=(*size, 1)).astype(np.float32), True) for size in SIZES]
    parts = ["once", images[0], " then this", images[1]]
    return [*parts[: 2 * count], *end]


def shown(part):
    """An image as a conditioning image; a text as it is."""
    return dataclasses.replace(part, denoise=False) if isinstance(part, Image) else part


def document(*arguments, noised_copies=True):
    return build_document(page(*arguments), TOKENIZER, LAYOUT, noised_copies=noised_copies)


def rows() -> dict[str, np.ndarray]:
    """Rows of: the page; another document and the page; the page cut after each image."""
    other = build_document(["before", page()[1], "it"], TOKENIZER, LAYOUT, noised_copies=True)
    once, first, *rest = page(2, ())  # the first image is clean where the second is denoised
    cut = build_document([once, shown(first), *rest], TOKENIZER, LAYOUT)
    made = [[document()], [other, document()], [document(1, ())], [cut]]
    pack = Pack([], LAYOUT, rows=4, length=LENGTH, buffer=1, pad_id=0, max_images=6)
    return pack.assemble(made)


def noised(batch, seed: int = 1):
    """x_t and noise levels: an image of n patches has the same noise in every row."""
    x_t, times = np.array(batch["patches"]), np.zeros((len(batch["tokens"]), 6), np.float32)
    for b, number in np.argwhere(times == 0):
        here = (batch["image_ids"][b] == number + 1) & (batch["token_types"][b] == PATCH)
        if here.any() and batch["denoise"][b][here].all():
            which = [h * w // 4 for h, w in SIZES].index(here.sum())
            t = times[b, number] = TIMES[which]
            noise = np.random.default_rng(seed + which).normal(size=(here.sum(), 4))
            x_t[b, here] = (1 - t) * x_t[b, here] + t * noise
    return jnp.asarray(x_t), jnp.asarray(times)


def predictions(batch, outputs) -> dict[tuple[int, int], np.ndarray]:
    """{(row, number of the image): its prediction} of the denoised images."""
    found = {}
    for b in range(len(batch["tokens"])):
        for number in range(1, 7):
            here = (batch["image_ids"][b] == number) & batch["denoise"][b]
            here &= batch["token_types"][b] == PATCH
            if here.any():
                found[b, number] = np.asarray(outputs.prediction[b][here])
    return found


def differences(outputs) -> dict[str, float]:
    """Largest difference of each copy's prediction from that of the page cut right after the image."""
    found = predictions(rows(), outputs)
    # Copies follow the images of their document; the packed page is after one with an image and a copy.
    pairs = {"first": ((0, 3), (2, 1)), "second": ((0, 4), (3, 2)),
             "packed first": ((1, 5), (2, 1)), "packed second": ((1, 6), (3, 2))}  # fmt: skip
    return {name: float(np.abs(found[a] - found[b]).max()) for name, (a, b) in pairs.items()}


def attention_difference(run) -> float:
    """The same for `run` alone: the second copy in the packed row, and the page cut after its image."""
    batch = rows()
    packed, cut = ({name: x[b] for name, x in batch.items()} for b in (1, 3))
    copy = np.flatnonzero(packed["image_ids"] == packed["image_ids"].max())
    begin = np.flatnonzero(packed["segment_ids"] == 2)[0]
    before = np.arange(begin, packed["prefix_stop"][copy[0], 0])
    source = np.concatenate([before, copy])
    drawn = [
        np.random.default_rng(i).normal(size=(1, LENGTH, n, 64)) for i, n in enumerate((2, 1, 1))
    ]
    outputs = []
    for row, places in ((packed, None), (cut, source)):
        qkv = [jnp.asarray(x, jnp.float32) for x in drawn]
        if places is not None:  # the tokens of the cut page are those that the copy sees
            qkv = [x.at[:, : len(places)].set(x[:, places]) for x in qkv]
        masks = row_masks({name: values[None] for name, values in row.items()})
        outputs.append(merge([run(*qkv, mask) for mask in masks])[0])
    return float(jnp.abs(outputs[0][source] - outputs[1][: len(source)])[len(before) :].max())
