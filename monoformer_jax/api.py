"""A trained model as a person uses it: texts and pictures in, texts and pictures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.config import Config, SamplingConfig
from monoformer_jax.data.documents import EndOfTurn, Part
from monoformer_jax.data.image_io import to_pil
from monoformer_jax.data.templates import CHAT_TEMPLATE
from monoformer_jax.data.tokenizer import Tokenizer, open_tokenizer
from monoformer_jax.errors import require
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingParams, generate_text

# A text, a picture (see `pictures.open_image`), or a list of both.
Content = Any


def load(
    workdir: epath.PathLike,
    *,
    vae: str | Path | None = None,
    vision: str | Path | None = None,
    dtype: str = "float32",
) -> Model:
    """The averaged weights of a run's newest checkpoint.

    Args:
      workdir: folder of the run, or storage such as gs://bucket/run.
      vae: folder of the autoencoder, for a model of latents.
      vision: folder of the CLIP tower, for a model that looks through one.
      dtype: of the weights; "bfloat16" halves their memory.

    Raises:
      InputError: no trained model there, or an autoencoder or tower that is of another model.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype={dtype!r} is not float32 or bfloat16")
    workdir = epath.Path(workdir)
    config, params, meta = load_trained(workdir, dtype)
    tokenizer = open_tokenizer(config.data, workdir, config.model.vocab_size)
    return Model(config, params, tokenizer, ImageProcessor(config, vae, vision), **meta)


@dataclasses.dataclass
class Model:
    """A trained model. Everything that it refuses is an `InputError` of one sentence.

    A prompt is a text, a picture, or a list of both; a picture is a path, bytes, a PIL image or an
    array. Pictures are cut to their centre and resized to the size that the model was trained with.
    Images come back as PIL images, or with output="numpy" as uint8 [height, width, channels].
    """

    config: Config
    params: dict = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    image_processor: ImageProcessor = dataclasses.field(repr=False)
    step: int = 0
    train_seconds: float = 0.0

    def generate_text(
        self,
        prompts: Content | Sequence[Content],
        *,
        max_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """One text a prompt, up to its end; the model cannot answer with an image here.

        Args:
          max_tokens: most tokens of an answer.
          temperature, top_k, top_p, repetition_penalty: see `SamplingParams`; one for all, or a list.
          stop: an answer ends before any of these.
          seed: for all, or one for each prompt, which then answers the same in any batch.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty, stop)
        written = generate_text(
            self.config, self.params, self.tokenizer, self._prompts(prompts),
            max_tokens=max_tokens, sampling=sampling, seed=seed, paints=False,
        )  # fmt: skip
        return [w.text for w in written]

    def generate_images(
        self,
        prompts: Content | Sequence[Content],
        *,
        count: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        output: str = "pil",
        preview: Callable[[int, list], None] | None = None,
        every: int = 0,
        **sampling,
    ) -> list:
        """`count` images of each prompt, those of a prompt together.

        Args:
          size: height and width, the trained size unless given.
          seed: for all, or one for each image.
          preview, every: called with (steps done, images) after every so many steps.
          sampling: steps, guidance, solver or any other key of the config's `sampling`.
        """
        require(count > 0, f"count={count} must be above 0")
        self.image_processor.check_decodable()
        self._check_output(output)

        def show(images):
            return [_as(image, output) for image in self.image_processor.decode(images)]

        if size is not None:
            factor = self.image_processor.factor
            require(
                all(side % factor == 0 for side in size),
                f"size={size}: both must be multiples of {factor}",
            )
            size = (size[0] // factor, size[1] // factor)
        parts = [parts for parts in self._prompts(prompts) for _ in range(count)]
        return show(generate_images(
            self.config, self.params, self.tokenizer, parts, sampling=self._sampling(sampling),
            size=size, seed=seed, every=every,
            preview=None if preview is None else lambda step, images: preview(step, show(images)),
        ))  # fmt: skip

    def edit(
        self,
        image: Content,
        instruction: str,
        *,
        image_guidance: float = 1.5,
        seed: int = 0,
        output: str = "pil",
        **sampling,
    ):
        """The picture changed as the instruction says: one image.

        Args:
          image_guidance: how closely to keep to the picture; `guidance` (see `generate_images`) is
            how closely to follow the instruction.
        """
        require(isinstance(instruction, str), "the instruction is a text")
        return self.generate_images(
            [[image, instruction]],
            seed=seed,
            output=output,
            image_guidance=image_guidance,
            **sampling,
        )[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Content]],
        *,
        max_tokens: int = 64,
        template: bool | None = None,
        seed: int = 0,
        output: str = "pil",
        preview: Callable[[int, list], None] | None = None,
        every: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        **sampling,
    ) -> list:
        """The answer to the last message: texts and images, as the model decides.

        Args:
          messages: {"role": "user" or "assistant", "content": a text, a picture or a list of both};
            an answer of this function is the content of an assistant's message.
          template: put what the user says into the original's chat template; unless told, where
            the model was trained on records, which do.
          preview, every: called with (steps done, the answer by now) after every so many steps of an
            image in it.
          sampling: of images, see `generate_images`.
        """
        self._check_output(output)
        template = bool(self.config.data.records) if template is None else template
        parts: list[Part] = []
        for number, message in enumerate(messages, 1):
            role = message.get("role")
            require(
                role in ("user", "assistant") and "content" in message,
                f"message {number} is not {{'role': 'user' or 'assistant', 'content': …}}",
            )
            new = self._parts(message["content"], f"message {number}")
            if template and role == "user":
                before, after = CHAT_TEMPLATE[0].split("{}")
                new = [before, *new, after]
            parts += [*new, EndOfTurn()] if role == "assistant" else new
        last = messages[-1]["role"] if messages else None
        require(last == "user", "the last message must be the user's")
        session = Session(
            self.config, self.params, self.tokenizer, 1, seed=seed,
            sampling=self._sampling(sampling), text=SamplingParams(temperature, top_k, top_p),
            look=self.image_processor.reencode,
        )  # fmt: skip
        session.append([parts])

        def show(answer):
            return [
                x if isinstance(x, str) else _as(self.image_processor.decode(x[None])[0], output)
                for x in answer
            ]

        look_on = None if preview is None else lambda step, rows: preview(step, show(rows[0]))
        return show(session.generate(max_tokens, preview=look_on, every=every)[0])

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingConfig:
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        unknown = sorted(changes.keys() - set(names))
        require(
            not unknown, f"there is no setting {', '.join(unknown)}; there are {', '.join(names)}"
        )
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self.config.sampling, **given)

    def _prompts(self, prompts) -> list[list[Part]]:
        prompts = prompts if isinstance(prompts, list | tuple) else [prompts]
        require(len(prompts) > 0, "there is no prompt: give at least one")
        return [self._parts(p, f"prompt {number}") for number, p in enumerate(prompts, 1)]

    def _parts(self, content: Content, name: str) -> list[Part]:
        content = content if isinstance(content, list | tuple) else [content]
        return [
            part
            if isinstance(part, str)
            else self.image_processor.encode(part, f"the image of {name}")
            for part in content
        ]

    def _check_output(self, output: str) -> None:
        require(output in ("pil", "numpy"), f"output={output!r} is neither 'pil' nor 'numpy'")


def _as(image: np.ndarray, output: str) -> PIL.Image.Image | np.ndarray:
    picture = to_pil(image)
    return picture if output == "pil" else np.asarray(picture).reshape(image.shape)
