"""A trained model as a person uses it: texts and pictures in, texts and pictures out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.config import Config, SamplingConfig, require
from monoformer_jax.data.documents import End, Features, Image, Part
from monoformer_jax.data.prompts import CHAT_TEMPLATE
from monoformer_jax.data.tokenizer import Tokenizer, open_tokenizer
from monoformer_jax.generation.image import generate_images
from monoformer_jax.generation.interleaved import Session
from monoformer_jax.generation.pictures import open_picture, to_picture, to_pixels
from monoformer_jax.generation.text import TextSampling, generate_text
from monoformer_jax.models import autoencoder, clip
from monoformer_jax.pretrained import clip as clip_folder
from monoformer_jax.pretrained import sd_vae
from monoformer_jax.pretrained.folder import open_weights, read_json
from monoformer_jax.pretrained.table import open_tree, read_tree
from monoformer_jax.training.checkpoint import load_trained

# A text, a picture (see `pictures.open_picture`), or a list of both.
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
    return Model(config, params, tokenizer, step=meta["step"], eyes=Eyes(config, vae, vision))


class Eyes:
    """Between pictures and what a model sees and paints: pixels, latents or features."""

    def __init__(self, config: Config, vae: str | Path | None, vision: str | Path | None):
        self.config, self.channels = config, config.model.channels
        self._vae = self._clip = None
        if vae is not None:
            c, params = sd_vae.load(Path(vae))
            require(
                c.latent_channels == self.channels,
                f"vae={vae} has latents of {c.latent_channels} channels, the model of "
                f"{self.channels}",
            )
            self._vae = c, params
        if vision is not None:
            c, params = _load_clip(Path(vision))
            require(
                c.width == config.model.feature_dim,
                f"vision={vision} has {c.width} features, the model looks at "
                f"{config.model.feature_dim}",
            )
            self._clip = c, params

    def check(self) -> None:
        """Raises InputError where what the model paints cannot be shown."""
        require(
            self._vae is not None or self.channels in (1, 3),
            f"the model paints latents of {self.channels} channels: give its autoencoder with "
            "vae=FOLDER (--vae=FOLDER)",
        )

    def show(self, painted: np.ndarray) -> np.ndarray:
        """What the model paints, [B, h, w, C], to pixels [B, h', w', 1 or 3] in [-1, 1]."""
        self.check()
        return painted if self._vae is None else np.asarray(self._decode(jnp.asarray(painted)))

    def look(self, source, name: str = "the image") -> Part:
        """A picture as a part of a prompt."""
        picture = open_picture(source, name)
        if self.config.model.feature_dim:
            require(
                self._clip is not None,
                "the model looks at images through a vision encoder: give its folder with "
                "vision=FOLDER (--vision=FOLDER)",
            )
            c, params = self._clip
            pixels = clip.preprocess(picture, c)[None]
            return Features(np.asarray(_features(params, pixels, c))[0])
        self.check()
        size = self.config.data.image_size
        if self._vae is None:
            return Image(to_pixels(picture, size, self.channels), denoise=False)
        c, params = self._vae
        pixels = to_pixels(picture, size * c.factor, 3)[None]
        return Image(np.asarray(_encode(params, pixels, c))[0], denoise=False)

    def look_again(self, painted: np.ndarray) -> Part:
        """An image [h, w, C] that the model has painted, as its context sees it."""
        if not self.config.model.feature_dim:
            return Image(painted, denoise=False)
        return self.look(to_picture(self.show(painted[None])[0]))

    @functools.cached_property
    def _decode(self):
        c, params = self._vae
        return jax.jit(lambda latents: autoencoder.bind(c, params).decode(latents))


def _load_clip(folder: Path) -> tuple[clip.ClipConfig, dict]:
    require(folder.is_dir(), f"vision={folder} is no folder")
    c = clip_folder.read_config(read_json(folder / "config.json"), folder / "config.json")
    target = jax.eval_shape(lambda: clip.init(c, jax.random.key(0)))
    tree = open_tree(clip_folder.table(c), open_weights(folder), target,
                     ignored=clip_folder.IGNORED, source=str(folder))  # fmt: skip
    return c, read_tree(tree)


@functools.partial(jax.jit, static_argnums=2)
def _encode(params, pixels, c):
    """The mean of the latents: what an image is, without the noise of training."""
    return autoencoder.bind(c, params).encode(pixels).mean * c.scale


@functools.partial(jax.jit, static_argnums=2)
def _features(params, pixels, c):
    return clip.bind(c, params).features(pixels)


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
    step: int
    eyes: Eyes = dataclasses.field(repr=False)

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
          temperature, top_k, top_p, repetition_penalty: see `TextSampling`; one for all, or a list.
          stop: an answer ends before any of these.
          seed: for all, or one for each prompt, which then answers the same in any batch.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = TextSampling(temperature, top_k, top_p, repetition_penalty, stop)
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
        self.eyes.check()
        self._check_output(output)

        def show(images):
            return [_as(image, output) for image in self.eyes.show(images)]

        if size is not None and self.eyes._vae is not None:
            factor = self.eyes._vae[0].factor
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
            parts += [*new, End()] if role == "assistant" else new
        last = messages[-1]["role"] if messages else None
        require(last == "user", "the last message must be the user's")
        session = Session(
            self.config, self.params, self.tokenizer, 1, seed=seed,
            sampling=self._sampling(sampling), text=TextSampling(temperature, top_k, top_p),
            look=self.eyes.look_again,
        )  # fmt: skip
        session.add([parts])

        def show(answer):
            return [
                x if isinstance(x, str) else _as(self.eyes.show(x[None])[0], output) for x in answer
            ]

        look_on = None if preview is None else lambda step, rows: preview(step, show(rows[0]))
        return show(session.reply(max_tokens, preview=look_on, every=every)[0])

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
            part if isinstance(part, str) else self.eyes.look(part, f"the image of {name}")
            for part in content
        ]

    def _check_output(self, output: str) -> None:
        require(output in ("pil", "numpy"), f"output={output!r} is neither 'pil' nor 'numpy'")


def _as(image: np.ndarray, output: str) -> PIL.Image.Image | np.ndarray:
    picture = to_picture(image)
    return picture if output == "pil" else np.asarray(picture).reshape(image.shape)
