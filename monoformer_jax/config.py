"""Every setting of a run, as frozen dataclasses: defaults here, experiments in `configs/`.

`configs/NAME.py` returns an `ml_collections.ConfigDict` that starts from `base_config()` and changes
what the experiment changes; `Config.from_dict` turns it back into these classes, where an unknown key
or a value out of range raises `InputError` before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, get_type_hints

import ml_collections

from monoformer_jax.errors import InputError, require


def _positive(config, group: str, name: str) -> None:
    value = getattr(config, name)
    require(value > 0, f"{group}{'.' if group else ''}{name}={value} must be above 0")


def _at_least(config, group: str, name: str, least: float) -> None:
    value = getattr(config, name)
    dot = "." if group else ""
    require(value >= least, f"{group}{dot}{name}={value} must be {least} or more")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name}={value!r} is none of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class OriginalConfig:
    """Variants that only the original's weights need; models/original.py describes them."""

    time_conditioning: str = "token"  # or "modulation"
    image_head: str = "adaln"  # or "add"
    position_embedding: str = "input"  # or "every_layer", or "none"
    context_images: str = "bidirectional"  # or "causal"
    bidirectional_images: bool = True

    def __post_init__(self):
        for name, choices in (
            ("time_conditioning", ("token", "modulation")),
            ("image_head", ("adaln", "add")),
            ("position_embedding", ("input", "every_layer", "none")),
            ("context_images", ("bidirectional", "causal")),
        ):
            _one_of(f"model.original.{name}", getattr(self, name), choices)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer; `SIZES` holds the named ones."""

    vocab_size: int = 262  # of the tokenizer; the tables are padded to a multiple of 128
    num_layers: int = 6
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 344
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    channels: int = 1  # of the image or latent
    patch_size: int = 2
    learn_sigma: bool = False  # the image head gives P more values a patch (DDPM weights need them)
    feature_dim: int = 0  # of the vision encoder that images to look at come through; 0: none
    dtype: str = "bfloat16"  # of the matrix products; parameters, norms and losses are float32
    # What the backward pass finds saved of a block: a name in jax.checkpoint_policies, "none" (all,
    # without a policy), or "save_names:a,b" with names of `SAVED_NAMES`; the rest it computes again.
    remat: str = "nothing_saveable"
    attention: str = "auto"  # see attention.interval_attention
    original: OriginalConfig = OriginalConfig()

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim",
                     "head_dim", "channels", "patch_size"):  # fmt: skip
            _positive(self, "model", name)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for RoPE")
        require(
            self.embed_dim % 4 == 0,
            f"model.embed_dim={self.embed_dim} must be a multiple of 4 for the 2-D position embedding",
        )
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _at_least(self, "model", "feature_dim", 0)
        _one_of("model.attention", self.attention, ("auto", "dense", "tpu", "gpu"))
        policy, colon, names = self.remat.partition(":")
        if colon and policy == "save_names":
            for name in names.split(","):
                _one_of("a name in model.remat", name, SAVED_NAMES)
        else:
            _one_of("model.remat", self.remat, (*REMAT_POLICIES, "save_names:NAME,…"))

    @property
    def padded_vocab(self) -> int:
        """Rows of the token tables, so that they can be sharded; padding never has probability."""
        return -(-self.vocab_size // 128) * 128

    @property
    def patch_dim(self) -> int:
        """P, the number of values in a patch."""
        return self.patch_size**2 * self.channels

    @property
    def time_tokens(self) -> int:
        """Tokens that stand before the patches of an image."""
        return 1 if self.original.time_conditioning == "token" else 0

    @property
    def output_dim(self) -> int:
        """Values that the image head gives for a patch: P, and P of its variance where it has one."""
        return self.patch_dim * (2 if self.learn_sigma else 1)


REMAT_POLICIES = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
# What "save_names:" can keep of each block: q, k and v after RoPE; what attention gives, with its
# statistics, so that it is not run again; the two products before the gate of the feed-forward.
SAVED_NAMES = ("qkv", "attention_out", "mlp_hidden")

# Named sizes; `ModelConfig(**named_size("tinyllama_1b"))`. tinyllama_1b is the backbone of the paper.
_LATENT = {"vocab_size": 32_004, "channels": 4, "patch_size": 2}
# Keeping the scores of attention takes a CPU longer than computing them again (1.4x for digits).
_ON_CPU = "save_names:attention_out,mlp_hidden"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
             "mlp_dim": 64, "dtype": "float32", "remat": _ON_CPU},
    "small": {"num_layers": 6, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
              "mlp_dim": 344, "dtype": "float32", "remat": _ON_CPU},
    "tinyllama_1b": _LATENT | {"num_layers": 22, "embed_dim": 2048, "num_heads": 32,
                               "num_kv_heads": 4, "head_dim": 64, "mlp_dim": 5632},
    "7b": _LATENT | {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 32,
                     "head_dim": 128, "mlp_dim": 11_008},
}  # fmt: skip


def named_size(name: str) -> dict[str, Any]:
    """Keys of `ModelConfig` for a named size; InputError when there is none of that name."""
    require(name in SIZES, f"there is no size {name!r}; there are {', '.join(SIZES)}")
    return SIZES[name]


# Which solvers walk from noise to image, for each objective.
SOLVERS_OF = {"rectified_flow": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the image head learns, and how the noise level t in [0, 1] is drawn (t = 1 is noise).

    "ddpm" draws one of its 1000 steps evenly; the other keys are of "rectified_flow".
    """

    t_sampler: str = "logit_normal"  # or "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0  # > 1 moves t towards noise, for images of many patches
    kind: str = "rectified_flow"  # velocity; or "ddpm": noise, and its variance with learn_sigma

    def __post_init__(self):
        _one_of("objective.kind", self.kind, tuple(SOLVERS_OF))
        _one_of("objective.t_sampler", self.t_sampler, ("uniform", "logit_normal"))
        _positive(self, "objective", "logit_std")
        _positive(self, "objective", "shift")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    text_weight: float = 1.0
    image_weight: float = 1.0
    # False is the original's rule: no text loss in a document with a denoised image, so captions and
    # <|im_start|> are never learned.
    text_beside_images: bool = True

    def __post_init__(self):
        for name in ("text_weight", "image_weight"):
            _at_least(self, "loss", name, 0)
        require(
            self.text_weight + self.image_weight > 0,
            "loss.text_weight and loss.image_weight are both 0: nothing to train",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    mixture: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"draw": 0.45, "read": 0.4, "say": 0.15}
    )  # weight of each source, a share of documents: draw, read and say are the digits
    # Folder of each other source, as `encode_latents` writes them: {"imagenet": "gs://…/imagenet"}.
    records: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sample_latents: bool = False  # latents are drawn anew at each step; False trains on their mean
    tokenizer: str = "bytes"  # or a tokenizer.json, in the workdir or elsewhere
    max_seq_len: int = 128  # L, and the longest prompt plus answer when generating
    packing_bins: int = 64  # rows that are filled at the same time, by each stream
    # The batch is packed by this many independent streams, whatever the number of processes. Each
    # process runs those that its rows come from: a multiple of the processes spares double work.
    streams: int = 1
    image_size: int = 8  # side in pixels (or latent values)
    prompt_dropout: float = 0.1  # share of prompts left out, for classifier-free guidance
    shift_pixels: int = 1  # images to read move by up to this much; images to draw never do
    truncate_text: bool = False  # cut a text that is longer than the row instead of dropping it

    def __post_init__(self):
        for name in ("max_seq_len", "packing_bins", "streams", "image_size"):
            _positive(self, "data", name)
        require(
            0 <= self.prompt_dropout <= 1,
            f"data.prompt_dropout={self.prompt_dropout} is not a share between 0 and 1",
        )
        _at_least(self, "data", "shift_pixels", 0)
        require(bool(self.mixture), "data.mixture names no source")
        for name, weight in self.mixture.items():
            require(
                isinstance(weight, float | int), f"data.mixture.{name}={weight!r} is not a number"
            )
            require(weight >= 0, f"data.mixture.{name}={weight} must be 0 or more")
        require(sum(self.mixture.values()) > 0, "data.mixture has no source with a weight above 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping, warm-up, and an exponential moving average of the weights."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or "constant"
    warmup_steps: int = 100
    final_fraction: float = 0.0  # of the learning rate, at the end of the cosine
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    decay_everything: bool = False  # the original's way; False spares norms and biases
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    ema_ramp: bool = True  # a shorter memory at first, so that the random start is forgotten
    grad_accum_steps: int = 1  # micro-batches a step
    first_moment_dtype: str = "float32"  # "bfloat16" saves 2 bytes a parameter

    def __post_init__(self):
        _one_of("optimizer.first_moment_dtype", self.first_moment_dtype, ("float32", "bfloat16"))
        _one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        for name in ("learning_rate", "clip_norm", "grad_accum_steps"):
            _positive(self, "optimizer", name)
        for name in ("warmup_steps", "weight_decay"):
            _at_least(self, "optimizer", name, 0)
        for name in ("b1", "b2", "ema_decay", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}={value} is not between 0 and 1")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Fine-tuning of a frozen decoder (`init_from`) through low-rank adapters; rank 0 trains it all.

    Adapters and the image parts are trained and checkpointed; decoder and vocabulary stay as they
    were, in the compute dtype.
    """

    rank: int = 0
    alpha: float = 16.0  # adapters are scaled by alpha / rank

    def __post_init__(self):
        _at_least(self, "lora", "rank", 0)
        _positive(self, "lora", "alpha")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes what is left.

    `data` copies the state, `fsdp` cuts it as ZeRO does, `tensor` cuts what a block computes; any mix
    works. With several `slices` the data axis alone runs between them, over the slow network.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `sample` and `evaluate`; their flags override them."""

    solver: str = "heun"  # or "euler"; with objective.kind="ddpm": "ddpm" (ancestral) or "ddim"
    steps: int = 20  # 1 to 1000
    guidance: float = 2.0  # by the prompt; 1 is no guidance
    # By the images of a prompt that has some, as in editing; 1 leaves it to `guidance`, which then
    # compares with the images alone. Other values cost a third evaluation.
    image_guidance: float = 1.0
    guidance_rescale: float = 0.0  # 1 keeps the size of the unguided prediction, 0 does not
    # "first_three" leaves the other channels unguided, as the original does with its four.
    guidance_channels: str = "all"
    guidance_low: float = 0.0  # guidance acts where low <= t <= high
    guidance_high: float = 1.0
    shift: float = 1.0  # of the time grid, as objective.shift
    clip: bool = False  # keep the image that DDPM sees within [-1, 1]; for pixels, not for latents

    def __post_init__(self):
        _one_of("sampling.solver", self.solver, sum(SOLVERS_OF.values(), ()))
        _one_of("sampling.guidance_channels", self.guidance_channels, ("all", "first_three"))
        for name in ("steps", "shift", "guidance", "image_guidance"):
            _positive(self, "sampling", name)
        require(self.steps <= 1000, f"sampling.steps={self.steps} must be 1000 or less")
        require(
            0 <= self.guidance_rescale <= 1,
            f"sampling.guidance_rescale={self.guidance_rescale} must be between 0 and 1",
        )
        require(
            0 <= self.guidance_low <= self.guidance_high <= 1,
            f"sampling.guidance_low={self.guidance_low} and guidance_high={self.guidance_high} must "
            "be in order between 0 and 1",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16  # packed rows a step, over all devices
    log_every: int = 50
    checkpoint_every: int = 500
    max_to_keep: int = 2
    keep_period: int = 0  # checkpoints at multiples of it are never deleted; 0: none is
    # A step that takes longer ends the process with code 5; the first may take an hour longer, as it
    # compiles. Must be longer than writing a checkpoint. 0 waits for ever.
    watchdog_seconds: float = 1800.0
    init_from: str = ""  # a workdir whose averaged weights a new run starts from; "" starts fresh
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "max_to_keep"):
            _positive(self, "", name)
        for name in ("keep_period", "watchdog_seconds"):
            _at_least(self, "", name, 0)
        require(
            self.keep_period % self.checkpoint_every == 0,
            f"keep_period={self.keep_period} is not a multiple of "
            f"checkpoint_every={self.checkpoint_every}",
        )
        require(
            self.batch_size % self.data.streams == 0,
            f"batch_size={self.batch_size} is not a multiple of data.streams={self.data.streams}",
        )
        require(
            self.batch_size % self.optimizer.grad_accum_steps == 0,
            f"batch_size={self.batch_size} is not a multiple of "
            f"optimizer.grad_accum_steps={self.optimizer.grad_accum_steps}",
        )
        require(
            not self.lora.rank or bool(self.init_from),
            f"lora.rank={self.lora.rank} adapts a trained model: name its workdir in init_from",
        )
        require(
            self.sampling.solver in SOLVERS_OF[self.objective.kind],
            f"sampling.solver={self.sampling.solver!r} does not sample objective.kind="
            f"{self.objective.kind!r}; {' and '.join(SOLVERS_OF[self.objective.kind])} do",
        )
        require(
            self.data.image_size % self.model.patch_size == 0,
            f"data.image_size={self.data.image_size} is not divisible by "
            f"model.patch_size={self.model.patch_size}",
        )
        require(
            self.image_tokens + 4 <= self.data.max_seq_len,
            f"data.max_seq_len={self.data.max_seq_len} cannot hold one image: it takes "
            f"{self.image_tokens} tokens with its time token, and <s>, <|im_start|>, <|im_end|>, "
            "</s> around it",
        )

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: its patches, and its time token where it has one."""
        return self.model.time_tokens + (self.data.image_size // self.model.patch_size) ** 2

    @property
    def max_images(self) -> int:
        """I, the most images that a row can hold."""
        return self.data.max_seq_len // self.image_tokens

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From nested mappings, such as a ConfigDict or config.json.

        Raises:
          InputError: an unknown key, a value of another type, or one that is out of range.
        """
        if isinstance(values, ml_collections.ConfigDict):
            values = values.to_dict()
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def base_config() -> ml_collections.ConfigDict:
    """Every key with its default, for `configs/NAME.py` to change."""
    return ml_collections.ConfigDict(Config().to_dict())


# Keys of earlier versions -> their names today.
RENAMED = {
    "checkpoints_kept": "max_to_keep",
    "checkpoint_keep_every": "keep_period",
    "data.row_length": "data.max_seq_len",
    "data.moments": "data.sample_latents",
    "optimizer.accumulation": "optimizer.grad_accum_steps",
} | {
    f"model.{field.name}": f"model.original.{field.name}"
    for field in dataclasses.fields(OriginalConfig)
}


def _build(cls, values: Mapping[str, Any], prefix: str):
    hints = get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            close = [prefix + name for name in difflib.get_close_matches(key, hints, 1)]
            close = [RENAMED[prefix + key]] if prefix + key in RENAMED else close
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"unknown config key {prefix}{key}{hint}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            require(isinstance(value, Mapping), f"config key {prefix}{key} is a group of keys")
            value = _build(kind, value, f"{prefix}{key}.")
        elif isinstance(kind, type):
            is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
            value = float(value) if is_number else value
            # bool is an int to Python, but True is no number of layers.
            fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
            require(fits, f"config key {prefix}{key}={value!r} is not of type {kind.__name__}")
        made[key] = value
    return cls(**made)
