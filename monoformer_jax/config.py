"""Every setting of a run, as frozen dataclasses: defaults here, experiments in `configs/`.

`configs/NAME.py` returns an `ml_collections.ConfigDict`: `models.base_config()` with the overrides of
the experiment. `models.make_config` converts it to these classes; an unknown key or an invalid value
raises `InputError` before anything is compiled. The group `model` is the dataclass of the chosen model
(`model.kind`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from monoformer_jax.errors import require


def positive(config, group: str, *names: str) -> None:
    """Raises InputError if one of these fields is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{_key(group, name)}={value} must be above 0")


def at_least(config, group: str, least: float, *names: str) -> None:
    """Raises InputError if one of these fields is below `least`."""
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{_key(group, name)}={value} must be {least} or more")


def one_of(name: str, value: str, choices) -> None:
    """Raises InputError unless the value is one of the choices."""
    require(value in choices, f"{name}={value!r} is none of {', '.join(choices)}")


def _key(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Token layout: the only properties of a model that data, batches and packing depend on."""

    vocab_size: int  # size of the tokenizer's vocabulary
    channels: int  # channels of the image or latent
    patch_size: int
    time_tokens: int = 1  # TIME tokens before the patches of an image
    feature_dim: int = (
        0  # F, feature size of the vision encoder for conditioning images; 0: no encoder
    )
    latent_variance: bool = False  # batches also hold the log-variance of latents
    noised_copies: bool = False  # documents may end with noised copies of their images
    max_patches: int = 0  # patches of the largest image that the model takes; 0: any number
    has_text: bool = True  # False: it generates images only, and a document has one to generate

    @property
    def patch_dim(self) -> int:
        """P, the number of values in a patch."""
        return self.patch_size**2 * self.channels

    def image_tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of this size: patches and time tokens."""
        return self.time_tokens + height * width // self.patch_size**2


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The diffusion objective, and the distribution of the noise level t in [0, 1] (t = 1 is noise).

    "ddpm" samples its 1000 steps uniformly; t_sampler, logit_* and shift apply to "rectified_flow".
    """

    t_sampler: str = "logit_normal"  # or "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0  # > 1 shifts t towards noise, for images of many patches
    kind: str = (
        "rectified_flow"  # predicts velocity; or "ddpm": predicts noise; see `diffusion.objectives`
    )
    learn_sigma: bool = False  # the image head also predicts the variance, as in improved DDPM
    # Noise schedule of "ddpm", with which it is also sampled: "linear" or "cosine" (arXiv 2102.09672).
    beta_schedule: str = "linear"
    # The highest noise level of an image that more follows than the end of its document, which then
    # sees it noised (Transfusion, arXiv 2408.11039: 0.5): the levels are scaled by it. 1: no limit.
    # data.noised_copies shows such images clean instead.
    noise_limit: float = 1.0

    def __post_init__(self):
        one_of("objective.t_sampler", self.t_sampler, ("uniform", "logit_normal"))
        positive(self, "objective", "logit_std", "shift", "noise_limit")
        require(
            self.noise_limit <= 1, f"objective.noise_limit={self.noise_limit} must be 1 or less"
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the text and image losses.

    Adam divides a gradient by its own size. A weight therefore sets the balance only in parameters that
    both losses reach: the decoder and the token embedding. The text head, which the text loss alone
    reaches, learns at the same rate with text_weight=0.01 as with 1, and the image head likewise.
    """

    text_weight: float = 1.0
    image_weight: float = 1.0
    # False as in the original: no text loss in a document with a denoised image, so captions and
    # <|im_start|> are not learned.
    text_beside_images: bool = True
    # Adds z_loss · (log Z)² to the cross-entropy of each token, where Z is the softmax's denominator:
    # it keeps logits small (PaLM, arXiv 2204.02311: 1e-4). `text_loss` includes it. 0: off.
    z_loss: float = 0.0

    def __post_init__(self):
        at_least(self, "loss", 0, "text_weight", "image_weight", "z_loss")
        require(
            self.text_weight + self.image_weight > 0,
            "loss.text_weight and loss.image_weight are both 0: there is nothing to train",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data sources, and how documents are packed into rows."""

    mixture: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"draw": 0.45, "read": 0.4, "say": 0.15}
    )  # source -> weight, by documents; tasks of digits and emoji, see `data.sources`
    # Folder of each other source, written by `prepare_data`: {"imagenet": "gs://…/imagenet"}.
    records: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sample_latents: bool = False  # from mean and log-variance at every step; False: the mean
    tokenizer: str = "bytes"  # or path of a tokenizer.json, relative to the workdir or not
    max_seq_len: int = 128  # L, packed row length; in sampling, prompt plus completion
    max_images: int = 0  # most images of a row, the slots of a U-Net patch codec; 0: as many as fit
    # Train every image of a document that continues after it on a noised copy behind the document:
    # what follows sees the image clean, as in sampling. False: it sees the noised image.
    noised_copies: bool = False
    packing_buffer: int = 64  # documents from which each stream chooses those that fill a row
    # The batch is packed by this many independent streams, for any number of hosts. Each host runs the
    # streams of its rows; there must be at least one for each. 0: see `Config.streams`.
    streams: int = 0
    image_size: int = 8  # image side in pixels (or latent values)
    # Probability that an image to generate stands before its caption, which is then read from it, in
    # examples of one caption and one image (Transfusion, arXiv 2408.11039: 0.2). See
    # objective.noise_limit and data.noised_copies for what the caption sees.
    image_first: float = 0.0
    # Probability that the images to generate of an example are clean and not learned, but the text
    # around them is: sampling goes on behind a clean image, also in a model that reads clean images.
    clean_images: float = 0.0
    prompt_dropout: float = 0.1  # probability of dropping a prompt, for classifier-free guidance
    # End a prompt with </s> in training and sampling, which marks it as complete. The released weights
    # and the digits were trained without it.
    end_of_prompt: bool = True
    # Examples that cannot be used (a damaged record, NaN in a latent, …) are skipped and counted. The
    # run stops if they are more than this share of 1000 consecutive examples of a stream.
    max_bad_fraction: float = 0.1
    shift_pixels: int = 1  # maximum random shift of digits in the read task
    emoji_subset: str = "gestures"  # "people", "all" or "fists"; see `data.emoji`
    emoji_split: int = 0  # seed of the combinations of emoji that are held out
    # Share of every source that is never trained and is measured instead, see `validation`. A hash of
    # the example decides, so the split is the same on every host and stays when data is added.
    validation_split: float = 0.0
    # Folder of records that are measured, of a source that is then trained whole.
    validation_records: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        positive(self, "data", "max_seq_len", "packing_buffer", "image_size")
        for name in ("prompt_dropout", "max_bad_fraction", "image_first", "clean_images"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value} is not between 0 and 1")
        require(
            0 <= self.validation_split <= 0.5,
            f"data.validation_split={self.validation_split} is not between 0 and 0.5",
        )
        for name in self.validation_records:
            require(
                name in self.mixture,
                f"data.validation_records.{name} is of no source: data.mixture has "
                f"{', '.join(self.mixture)}",
            )
        at_least(self, "data", 0, "max_images", "shift_pixels", "streams", "emoji_split")
        require(bool(self.mixture), "data.mixture has no source")
        for name, weight in self.mixture.items():
            require(weight >= 0, f"data.mixture.{name}={weight} must be 0 or more")
        require(sum(self.mixture.values()) > 0, "data.mixture has no source with a weight above 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping, warm-up, and an exponential moving average of the weights."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or "constant"
    warmup_steps: int = 100
    final_fraction: float = 0.0  # final learning rate of the cosine, as a fraction of learning_rate
    # Step at which warm-up and cosine begin again (SGDR, arXiv 1608.03983), which extends a finished
    # cosine run: its number of steps. 0: they begin once.
    restart_step: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    decay_everything: bool = (
        False  # True as in the original; False excludes norms and biases from decay
    )
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    ema_ramp: bool = (
        True  # lower decay in the first steps, to reduce the weight of the initialization
    )
    grad_accum_steps: int = 1  # micro-batches per step
    first_moment_dtype: str = "float32"  # "bfloat16" saves 2 bytes per parameter

    def __post_init__(self):
        one_of("optimizer.first_moment_dtype", self.first_moment_dtype, ("float32", "bfloat16"))
        one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        positive(self, "optimizer", "learning_rate", "clip_norm", "grad_accum_steps")
        at_least(self, "optimizer", 0, "warmup_steps", "restart_step", "weight_decay")
        require(
            not self.restart_step or self.schedule == "cosine",
            f"optimizer.restart_step={self.restart_step} needs optimizer.schedule='cosine'",
        )
        for name in ("b1", "b2", "ema_decay", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}={value} is not between 0 and 1")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Fine-tuning of a frozen model (`init_from`) with low-rank adapters; rank 0 trains all parameters.

    Adapters and image modules are trained and checkpointed; the other parameters are frozen, in the
    compute dtype.
    """

    rank: int = 0
    alpha: float = 16.0  # adapters are scaled by alpha / rank

    def __post_init__(self):
        at_least(self, "lora", 0, "rank")
        positive(self, "lora", "alpha")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh axis sizes; one axis may be -1, which takes the remaining devices.

    `data` replicates the train state, `fsdp` shards it as in ZeRO-3, `tensor` is tensor parallelism;
    any combination works. With several `slices` only the data axis spans slices, over the data-center
    network.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Image sampling defaults of `sample` and `evaluate`; their flags override them."""

    solver: str = "heun"  # or "euler"; with objective.kind="ddpm": "ddpm" (ancestral) or "ddim"
    steps: int = 20  # 1 to 1000
    guidance: float = 2.0  # guidance scale of the prompt; 1 is no guidance
    # Text that guidance leads away from, in place of no text; "": off. Trained as prompts are.
    negative_prompt: str = ""
    # Guidance scale of conditioning images, as in editing; with 1, `guidance` guides against the
    # images alone. Other values need a third evaluation.
    image_guidance: float = 1.0
    guidance_rescale: float = (
        0.0  # 1: rescale to the standard deviation of the conditional prediction, 0: off
    )
    # "first_three" guides the first three channels only, as the original does for its four.
    guidance_channels: str = "all"
    guidance_low: float = 0.0  # guidance is applied where low <= t <= high
    guidance_high: float = 1.0
    # Scale and interval of `sample --total`, whose images are scored: FID wants less guidance than
    # images to look at. 0: `guidance` and its interval.
    fid_guidance: float = 0.0
    fid_guidance_low: float = 0.0
    fid_guidance_high: float = 1.0
    shift: float = 0.0  # shift of the time grid; 0: objective.shift, that of training
    beta_schedule: str = ""  # noise schedule of "ddpm" and "ddim"; "": objective.beta_schedule
    clip: bool = (
        False  # clip the clean image that DDPM predicts to [-1, 1]; for pixels, not latents
    )

    def __post_init__(self):
        one_of("sampling.guidance_channels", self.guidance_channels, ("all", "first_three"))
        one_of("sampling.beta_schedule", self.beta_schedule, ("", "linear", "cosine"))
        positive(self, "sampling", "steps", "guidance", "image_guidance")
        at_least(self, "sampling", 0, "shift", "fid_guidance")
        require(self.steps <= 1000, f"sampling.steps={self.steps} must be 1000 or less")
        require(
            not self.negative_prompt or self.guidance != 1,
            "sampling.negative_prompt needs a sampling.guidance other than 1",
        )
        require(
            0 <= self.guidance_rescale <= 1,
            f"sampling.guidance_rescale={self.guidance_rescale} must be between 0 and 1",
        )
        for name in ("guidance", "fid_guidance"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            require(
                0 <= low <= high <= 1,
                f"sampling.{name}_low={low} and {name}_high={high} must be ordered and between 0 and 1",
            )


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What training measures and draws with the EMA weights; what it measures is held out by
    data.validation_split or data.validation_records."""

    # Steps between validations; also before the first step and after the last one. 0: off.
    every: int = 0
    rows: int = 64  # packed rows of held-out examples that are measured, at most
    # Prompts of the sample grid; default: prompts of held-out examples, and without those no grid.
    prompts: tuple[str, ...] = ()
    samples: int = 6  # held-out examples that are drawn, and as many that are read
    # Warns when a held-out loss of a run that starts from weights (init_from) exceeds that of step 0 by
    # more than this fraction.
    margin: float = 0.1
    vae: str = ""  # folder of the autoencoder that decodes the samples of a latent model

    def __post_init__(self):
        at_least(self, "validation", 0, "every", "margin")
        positive(self, "validation", "rows", "samples")
        require(all(self.prompts), "validation.prompts has an empty prompt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Config of a run. `model` is the dataclass of the chosen model, see `models.MODELS`."""

    model: Any
    name: str = "unnamed"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16  # packed rows per step, over all devices
    log_every: int = 50
    checkpoint_every: int = 500
    max_to_keep: int = 2  # number of newest checkpoints to keep
    keep_period: int = 0  # checkpoints at multiples of this step are never deleted; 0: off
    # A step that takes longer ends the process with exit code 5; the first may take an hour longer, to
    # compile. It must exceed the time of writing a checkpoint. 0: no limit.
    watchdog_seconds: float = 1800.0
    # Processes of each host that read and pack its rows, whose content does not depend on it. -1: one
    # per stream of the host, up to half of its cores; none on a CPU, where the model takes all cores,
    # or without data.records.
    data_workers: int = -1
    # Options of XLA's compiler, "NAME=VALUE,…", over those of `runtime.compiler` for the chip.
    compiler_options: str = ""
    init_from: str = ""  # workdir whose EMA weights initialize a new run; "": random initialization
    objective: ObjectiveConfig = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    sampling: SamplingConfig = SamplingConfig()
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self):
        require(0 <= self.seed < 2**32, f"seed={self.seed} is not between 0 and 2**32 - 1")
        positive(self, "", "steps", "batch_size", "log_every", "checkpoint_every", "max_to_keep")
        at_least(self, "", 0, "keep_period", "watchdog_seconds")
        at_least(self, "", -1, "data_workers")
        require(
            self.keep_period % self.checkpoint_every == 0,
            f"keep_period={self.keep_period} is not a multiple of "
            f"checkpoint_every={self.checkpoint_every}",
        )
        self._check_validation()
        # The default number of streams divides every batch.
        streams, micro = self.data.streams or 1, self.optimizer.grad_accum_steps
        for name, parts in (("data.streams", streams), ("optimizer.grad_accum_steps", micro)):
            fits = -(-self.batch_size // math.lcm(streams, micro)) * math.lcm(streams, micro)
            require(
                self.batch_size % parts == 0,
                f"batch_size={self.batch_size} is not a multiple of {name}={parts}; "
                f"batch_size={fits} is",
            )
        require(
            self.optimizer.restart_step < self.steps,
            f"optimizer.restart_step={self.optimizer.restart_step} is not below steps={self.steps}",
        )
        require(
            not self.lora.rank or bool(self.init_from),
            f"lora.rank={self.lora.rank} adapts a trained model: set init_from to its workdir",
        )
        patch_size = self.layout.patch_size
        require(
            self.data.image_size % patch_size == 0,
            f"data.image_size={self.data.image_size} is not divisible by model.patch_size={patch_size}",
        )
        most = self.layout.max_patches
        require(
            not most or most * patch_size**2 == self.data.image_size**2,
            f"model.max_patches={most}, but data.image_size={self.data.image_size} is "
            f"{(self.data.image_size // patch_size) ** 2} patches",
        )
        require(
            self.image_tokens + 4 <= self.data.max_seq_len,
            f"data.max_seq_len={self.data.max_seq_len} cannot hold one image: it needs "
            f"{self.image_tokens} tokens with its time token, and <s>, <|im_start|>, <|im_end|>, "
            "</s> around it",
        )
        if self.data.noised_copies or self.data.clean_images:
            self._check_clean()
        # The output size of the image head depends on objective.learn_sigma.
        model = dataclasses.replace(self.model, predict_variance=self.objective.learn_sigma)
        object.__setattr__(self, "model", model)

    def _check_clean(self) -> None:
        layout, copies = self.model.layout, self.data.noised_copies
        require(
            layout.has_text and not layout.feature_dim,
            f"data.{'noised_copies' if copies else 'clean_images'} needs a model that reads text and "
            "sees the images that it generates: "
            + ("model.feature_dim must be 0" if layout.has_text else "this one has no text"),
        )
        require(
            not copies or self.objective.noise_limit == 1,
            "data.noised_copies shows images clean and objective.noise_limit noised: keep one of them",
        )

    def _check_validation(self) -> None:
        every = self.validation.every
        if not every:
            return
        require(
            self.holds_out or bool(self.validation.prompts),
            f"validation.every={every}, but there is nothing to measure or draw: set "
            "data.validation_split, data.validation_records or validation.prompts",
        )
        # The best checkpoint is one of those whose step was measured.
        require(
            self.checkpoint_every % every == 0 or every % self.checkpoint_every == 0,
            f"validation.every={every} and checkpoint_every={self.checkpoint_every}: one must be a "
            "multiple of the other",
        )

    @property
    def holds_out(self) -> bool:
        """Whether some examples are not trained, but measured."""
        return bool(self.data.validation_split or self.data.validation_records)

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the model, for data, batches and packing."""
        return dataclasses.replace(
            self.model.layout,
            latent_variance=self.data.sample_latents,
            noised_copies=self.data.noised_copies,
        )

    @property
    def streams(self) -> int:
        """Number of streams that pack the batch: data.streams, or by default one for every four rows,
        up to 64, rounded down to a power of two that divides batch_size / 4.

        The default depends on nothing else, so that any number of hosts resumes the run. A host of a
        TPU slice has at least four chips, so at least four rows. More streams would cost: each reads
        `data.packing_buffer` documents before its first row, and keeps them in memory.
        """
        return self.data.streams or max(math.gcd(self.batch_size, 4 * 64) // 4, 1)

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image of data.image_size."""
        return self.layout.image_tokens(self.data.image_size, self.data.image_size)

    @property
    def max_images(self) -> int:
        """I, the maximum number of images in a row."""
        fit = self.data.max_seq_len // self.image_tokens
        return min(self.data.max_images or fit, fit)

    def image_sampling(self, sampling: SamplingConfig | None = None) -> SamplingConfig:
        """Sampling settings, by default the config's, with those of training where they have none."""
        sampling = self.sampling if sampling is None else sampling
        return dataclasses.replace(
            sampling,
            shift=sampling.shift or self.objective.shift,
            beta_schedule=sampling.beta_schedule or self.objective.beta_schedule,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns nested values, the inverse of `models.make_config`."""
        values = dataclasses.asdict(self)
        del values["model"]["predict_variance"]  # objective.learn_sigma
        return values

    def to_json(self) -> str:
        """Returns the text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
