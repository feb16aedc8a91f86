"""What a model draws and reads at fixed prompts with fixed noise, to compare steps of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps

from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.config import ValidationConfig
from monoformer_jax.data.documents import EndOfTurn, Features, Image, Part, UntrainedText
from monoformer_jax.data.image_io import to_pil
from monoformer_jax.data.templates import complete_prompt
from monoformer_jax.errors import InputError
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import generate_text

_TOKENS = 64  # of an answer, at most
_TILE = 128  # pixels of a side in a column of pictures, at least


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A prompt to draw, and the held-out image that it was written for, if there is one."""

    prompt: list[Part]
    target: np.ndarray | None

    @property
    def words(self) -> str:
        return caption(self.prompt)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt to answer in text, and the held-out answer."""

    prompt: list[Part]
    answer: str

    @property
    def words(self) -> str:
        return f"{caption(self.prompt)}\0{self.answer}"

    @property
    def picture(self) -> np.ndarray | None:
        """The last image of the prompt, if it has one."""
        shown = [part.pixels for part in self.prompt if isinstance(part, Image)]
        return shown[-1] if shown else None


class Samples:
    """Fixed drawings and readings of a run.

    Attributes:
      drawings, readings: what is drawn and read.
      missing: why nothing is drawn, if a latent model has no autoencoder.
    """

    def __init__(
        self, sampler: Sampler, c: ValidationConfig, examples: Mapping[str, list[list[Part]]]
    ):
        """Args:
        sampler: the model; its weights are not read.
        examples: held-out examples of each source.

        Raises:
          InputError: validation.prompts of a latent model without validation.vae, or an autoencoder
            that does not fit.
        """
        config = sampler.config
        self.missing = ""
        self._processor = ImageProcessor(config.layout, config.data.image_size, c.vae or None)
        end = config.data.end_of_prompt
        self.drawings = [Drawing(complete_prompt([text], end), None) for text in c.prompts]
        if not self.drawings:
            self.drawings = _distinct(map(drawing, in_turn(examples.values())), c.samples)
        try:
            self._processor.codec.check()
        except InputError:
            if c.prompts:
                raise
            self.missing = (
                "no samples are drawn: the model generates latents, give their autoencoder with "
                "--config.validation.vae=FOLDER"
            )
            self.drawings = []
        found = map(_reading, in_turn(examples.values()))
        self.readings = _distinct(found, c.samples) if config.layout.has_text else []

    def draw(self, sampler: Sampler) -> np.ndarray:
        """Draws the prompts, pixels float32 [n, h, w, 1 or 3]; every process must call it."""
        images = generate_images(sampler, [d.prompt for d in self.drawings], seed=0)
        return np.asarray(self._processor.decode(images))

    def decode_each(self, images: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Pixels of images of any sizes; None where there is none, or no autoencoder."""
        if self.missing:
            return [None] * len(images)
        return [
            None if x is None else np.asarray(self._processor.decode(x[None]))[0] for x in images
        ]

    def read(self, sampler: Sampler) -> list[str]:
        """Answers the readings, greedily; every process must call it."""
        encode = sampler.tokenizer.encode
        most = max(len(encode(reading.answer)) for reading in self.readings) + 8
        prompts = [reading.prompt for reading in self.readings]
        found = generate_text(sampler, prompts, max_tokens=min(most, _TOKENS), allow_images=False)
        return [completion.text for completion in found]


def _distinct(found: Iterable[Drawing | Reading | None], most: int) -> list:
    """The first of them, with different words."""
    kept: dict[str, Drawing | Reading] = {}
    for one in found:
        if one is not None and len(kept) < most:
            kept.setdefault(one.words, one)
    return list(kept.values())


def in_turn(sources: Iterable[list[list[Part]]]) -> Iterator[list[Part]]:
    """The examples of all sources, one of each in turn."""
    for examples in itertools.zip_longest(*sources):
        yield from (example for example in examples if example is not None)


def drawing(parts: Sequence[Part]) -> Drawing | None:
    """What precedes the first image to generate; None if nothing does."""
    for number, part in enumerate(parts):
        if isinstance(part, Image) and part.denoise:
            return Drawing(list(parts[:number]), part.pixels) if number else None
    return None


def _reading(parts: Sequence[Part]) -> Reading | None:
    """What precedes the first text with loss after a conditioning image or a text without loss.

    None for an example with an image to generate, whose text is its prompt.
    """
    if any(isinstance(part, Image) and part.denoise for part in parts):
        return None
    given = False
    for number, part in enumerate(parts):
        if given and isinstance(part, str) and part:
            return Reading(list(parts[:number]), part)
        given |= isinstance(part, Image | Features | UntrainedText)
    return None


def strip(images: Sequence[np.ndarray | None]) -> PIL.Image.Image:
    """Pictures [h, w, 1 or 3] in [-1, 1] as a column of squares; None is a white one."""
    sides = [max(image.shape[:2]) for image in images if image is not None]
    side = max([_TILE, *sides])
    column = PIL.Image.new("RGB", (side, side * len(images)), "white")
    for number, image in enumerate(images):
        if image is not None:
            picture = to_pil(image).convert("RGB")
            small = 2 * max(picture.size) <= side
            method = PIL.Image.Resampling.NEAREST if small else PIL.Image.Resampling.BICUBIC
            square = PIL.ImageOps.pad(picture, (side, side), method, "white")
            column.paste(square, (0, number * side))
    return column


def caption(parts: Sequence[Part]) -> str:
    """The text of a prompt, with [picture] in place of images."""
    words = []
    for part in parts:
        if isinstance(part, Image | Features):
            words.append("[picture]")
        elif not isinstance(part, EndOfTurn):
            words.append(part if isinstance(part, str) else part.text)
    return " ".join(word.strip() for word in words)
