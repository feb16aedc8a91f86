"""Public API: load a trained model and generate text and images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh

from monoformer_jax.codecs.image_processor import ImageProcessor
from monoformer_jax.config import SamplingConfig
from monoformer_jax.config_values import build
from monoformer_jax.data.content import open_source, read_content
from monoformer_jax.data.documents import Part
from monoformer_jax.data.image_io import to_pil
from monoformer_jax.data.templates import ROLES, chat_parts, complete_prompt
from monoformer_jax.data.tokenizer import open_tokenizer
from monoformer_jax.errors import require, whole_number
from monoformer_jax.files import expand
from monoformer_jax.pretrained.model import load_exported
from monoformer_jax.runtime.compile_cache import use_compile_cache
from monoformer_jax.runtime.workdir import model_folder, read_config
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler, sampling_mesh
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingParams, generate_text

# A text, an image (see `image_io.open_image`), or a list of both.
Content = Any
Output = Literal["pil", "numpy"]


def load(
    workdir: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    checkpoint: int | Literal["best"] | None = None,
) -> Model:
    """Loads the EMA weights of a checkpoint of a run, or a model in one file of weights.

    Compiled programs are kept in the user's cache folder, see `runtime.compile_cache`.

    Args:
      workdir: folder of the run, or storage such as gs://bucket/run; a folder of safetensors that
        `convert` wrote; or "showcase", the model that comes with the package.
      vae: folder of the autoencoder, for a latent model.
      vision: folder of the CLIP vision tower, for a model with a vision encoder.
      dtype: dtype of the weights; "bfloat16" halves their memory.
      mesh: devices to sample on; default: all local devices, with the smallest `tensor` axis on which
        the weights fit.
      checkpoint: its step, or "best" for that with the lowest held-out loss; default: the newest.

    Raises:
      InputError: `workdir` is no folder and no such name, it has no trained model, or the
        autoencoder or vision tower does not fit it.
    """
    require(dtype in ("float32", "bfloat16"), f"dtype={dtype!r} is not float32 or bfloat16")
    if checkpoint not in (None, "best"):
        checkpoint = whole_number(checkpoint, "checkpoint", 0)
    folder = model_folder(workdir)
    vae, vision = (None if path is None else Path(expand(path)) for path in (vae, vision))
    use_compile_cache()
    config = read_config(folder)  # the small things first: their errors come before the weights
    tokenizer = open_tokenizer(config.data, folder, config.layout.vocab_size)
    processor = ImageProcessor(config.layout, config.data.image_size, vae, vision)
    mesh = mesh or sampling_mesh(config, jax.local_devices(), dtype)
    meta: dict[str, Any] = {}
    if (folder / "model.safetensors").exists():
        require(checkpoint is None, f"{workdir} has one set of weights: leave out checkpoint")
        params = load_exported(Path(folder), dtype, mesh)
    else:
        from monoformer_jax.runtime.weights import load_trained  # orbax takes half a second

        config, params, meta = load_trained(folder, dtype, mesh, checkpoint)
    mesh = None if mesh.size == 1 else mesh  # a single device needs no mesh
    return Model(config, params, tokenizer, mesh, image_processor=processor, **meta)


@dataclasses.dataclass(kw_only=True)
class Model(Sampler):
    """A trained model. Invalid input raises `InputError` with a message of one sentence.

    A prompt is a text, an image, or a list of both; an image is a path, bytes, a PIL image, an array, a
    data: URL, or a part in the form of OpenAI's API, see `data.content`. A string that ends like the
    name of an image file is its path. Input images are center-cropped and resized to the trained size.
    Generated images are PIL images, or with output="numpy" uint8 arrays [height, width, channels].
    """

    image_processor: ImageProcessor = dataclasses.field(repr=False)
    step: int = 0
    train_seconds: float = 0.0

    def generate_text(
        self,
        prompts: Content | Sequence[Content],
        *,
        continue_prompt: bool = False,
        max_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Generates one text per prompt; images are disabled.

        Args:
          continue_prompt: continue the words of the prompts. By default a prompt is complete, and is
            answered: in training, `data.end_of_prompt` marked its end with </s>.
          max_tokens: maximum tokens per text.
          temperature, top_k, top_p, repetition_penalty: see `SamplingParams`; one value, or a list.
          stop: stop strings; a text ends before the first one.
          seed: one for all prompts, or a list of one per prompt, which makes each text batch-invariant.
        """
        sampling = SamplingParams(temperature, top_k, top_p, repetition_penalty,
                                  (stop,) if isinstance(stop, str) else stop)  # fmt: skip
        completions = generate_text(
            self, self._prompts(prompts, continue_prompt), max_tokens=max_tokens, sampling=sampling,
            seed=seed, allow_images=False,
        )  # fmt: skip
        return [completion.text for completion in completions]

    def generate_images(
        self,
        prompts: Content | Sequence[Content],
        *,
        count: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        output: Output = "pil",
        preview: Callable[[int, list], None] | None = None,
        every: int = 0,
        **sampling: Any,
    ) -> list[Any]:
        """Generates `count` images per prompt; the images of a prompt are adjacent.

        Args:
          size: height and width in pixels; default: the trained size.
          seed: one for all images, or a list of one per image.
          output: "pil" or "numpy".
          preview, every: `preview(steps done, images)` is called every `every` steps.
          sampling: steps, guidance, negative_prompt, solver or any other key of the config's
            `sampling`.
        """
        count = whole_number(count, "count", 1)
        every = _check_preview(preview, every)
        self.image_processor.codec.check()
        self._check_output(output)

        def show(images):
            return [_as(image, output) for image in self.image_processor.decode(images)]

        if size is not None:
            factor = self.image_processor.codec.factor
            require(
                isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2,
                f"size={size!r} is not (height, width)",
            )
            height, width = (whole_number(side, "size", 1) for side in size)
            require(
                height % factor == width % factor == 0,
                f"size={size}: both must be multiples of {factor}",
            )
            size = (height // factor, width // factor)
        parts = [parts for parts in self._prompts(prompts) for _ in range(count)]
        return show(generate_images(
            self, parts, sampling=self._sampling(sampling), size=size, seed=seed, every=every,
            preview=None if preview is None else lambda step, images: preview(step, show(images)),
        ))  # fmt: skip

    def edit(
        self,
        image: Content,
        instruction: str,
        *,
        image_guidance: float = 1.5,
        seed: int = 0,
        output: Output = "pil",
        **sampling,
    ):
        """Edits an image according to an instruction; returns one image.

        Args:
          image_guidance: guidance scale of the input image; `guidance` (see `generate_images`) is that
            of the instruction.
        """
        require(isinstance(instruction, str), "the instruction must be a text")
        picture = open_source(image, "the image of the prompt")
        return self.generate_images(
            [[picture, {"type": "text", "text": instruction}]],
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
        output: Output = "pil",
        preview: Callable[[int, list], None] | None = None,
        every: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        **sampling: Any,
    ) -> list[Any]:
        """Answers the last message with texts and images; the model chooses the modality.

        Args:
          messages: {"role": "user" or "assistant", "content": a text, an image or a list of both};
            the return value can be the content of an assistant message. "system" is also a role. A
            string is always a text; the path of an image is a `Path`, or a part of `data.content`.
          template: apply the original's chat template; default: True if the model was trained on
            records, which use it.
          preview, every: `preview(steps done, answer so far)` is called every `every` denoising steps.
          sampling: image sampling settings, see `generate_images`.
        """
        self._check_output(output)
        every = _check_preview(preview, every)
        require(
            isinstance(messages, list | tuple),
            f"the messages are of type {type(messages).__name__}, not a list of "
            "{'role': …, 'content': …}",
        )
        template = bool(self.config.data.records) if template is None else template
        turns = []
        for number, message in enumerate(messages, 1):
            good = isinstance(message, Mapping) and message.get("role") in ROLES
            require(
                good and "content" in message,
                f"message {number} is not {{'role': {' or '.join(ROLES)}, 'content': …}}",
            )
            content = self._content(message, f"message {number}")
            turns.append({"role": message["role"], "content": content})
        last = turns[-1]["role"] if turns else None
        require(last == "user", "the last message must have the role user")
        parts: list[Part] = []
        if template:
            parts = chat_parts(turns)
        else:
            for turn in turns:
                ends = turn["role"] == "assistant" or self.config.data.end_of_prompt
                parts += complete_prompt(turn["content"], ends)
        session = Session(
            self, 1, seed=seed, sampling=self._sampling(sampling),
            text=SamplingParams(temperature, top_k, top_p), reencode=self.image_processor.reencode,
        )  # fmt: skip
        session.append([parts])

        def show(answer):
            return [
                x if isinstance(x, str) else _as(self.image_processor.decode(x[None])[0], output)
                for x in answer
            ]

        on_step = None if preview is None else lambda step, rows: preview(step, show(rows[0]))
        return show(session.generate(max_tokens, preview=on_step, every=every)[0])

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingConfig:
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        unknown = sorted(changes.keys() - set(names))
        require(
            not unknown, f"unknown setting {', '.join(unknown)}: choose from {', '.join(names)}"
        )
        given = {name: value for name, value in changes.items() if value is not None}
        return build(SamplingConfig, dataclasses.asdict(self.config.sampling) | given, "sampling.")

    def _prompts(self, prompts, continued: bool = False) -> list[list[Part]]:
        """The parts of each prompt, with its end marked as in training unless it is continued."""
        prompts = prompts if isinstance(prompts, list | tuple) else [prompts]
        require(len(prompts) > 0, "there is no prompt: give at least one")
        ends = self.config.data.end_of_prompt and not continued
        return [
            complete_prompt(self._parts(p, f"prompt {number}"), ends)
            for number, p in enumerate(prompts, 1)
        ]

    def _parts(self, content: Content, name: str, *, paths: bool = True) -> list[Part]:
        """The parts of a prompt or a message; see `data.content`, also for `paths`."""
        return [
            part
            if isinstance(part, str)
            else self.image_processor.encode(part, f"the image of {name}")
            for part in read_content(content, name, paths=paths)
        ]

    def _content(self, message: Mapping[str, Content], name: str) -> list[Part]:
        """The parts of a message; the model's own texts are never taken for paths."""
        content = message["content"]
        if message["role"] == "assistant" and isinstance(content, list | tuple):
            content = [{"type": "text", "text": x} if isinstance(x, str) else x for x in content]
        return self._parts(content, name, paths=False)

    def _check_output(self, output: str) -> None:
        require(output in ("pil", "numpy"), f"output={output!r} is not 'pil' or 'numpy'")


def _check_preview(preview: Any, every: int) -> int:
    require(preview is None or callable(preview), f"preview={preview!r} is not a function")
    return whole_number(every, "every", 0)


def _as(image: np.ndarray, output: str) -> PIL.Image.Image | np.ndarray:
    picture = to_pil(image)
    return picture if output == "pil" else np.asarray(picture).reshape(image.shape)
