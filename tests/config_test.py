"""Config: errors are one sentence, every key is used, named sizes have the published sizes."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.cli import load_config
from monoformer_jax.config import Config
from monoformer_jax.data.documents import Image, Prompt
from monoformer_jax.data.records import write_records
from monoformer_jax.errors import InputError
from monoformer_jax.models import make_config, monoformer, named_size
from monoformer_jax.models.monoformer import MonoFormerConfig

DIGITS = str(ROOT / "configs" / "digits.py")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["--config.model.mlpdim=3"],
            "unknown config key model.mlpdim; did you mean model.mlp_dim",
        ),
        (["--config.modle.mlp_dim=3"], "unknown config key modle; did you mean model"),
        (["--config.steps=many"], "steps='many' is not of type int"),
        (["--config.steps=True"], "steps=True is not of type int"),
        (["--config.model.num_layers=2.5"], "num_layers=2.5 is not of type int"),
        (["--config.steps.x=1"], "steps is a value, not a group"),
        (["--config.model=1"], "model is a group"),
        (["--config.steps"], "write it as --config.steps=VALUE"),
        (["--config.steps=0"], "steps=0 must be above 0"),
        (
            ["--config.model.num_kv_heads=3"],
            "num_heads=4 is not a multiple of model.num_kv_heads=3",
        ),
        (["--config.model.remat=all"], "model.remat='all' is none of none, nothing_saveable"),
        (
            ["--config.model.remat=save_names:qkv,out"],
            "a name in model.remat='out' is none of qkv, attention_out, residual, mlp_hidden",
        ),
        (["--config.model.patch_size=3"], "image_size=8 is not divisible by model.patch_size=3"),
        (
            ["--config.data.max_seq_len=20"],
            "data.max_seq_len=20 cannot hold one image: it needs 17",
        ),
        (["--config.data.prompt_dropout=1.5"], "prompt_dropout=1.5 is not between"),
        (["--config.data.mixture.draw=-1"], "mixture.draw=-1.0 must be 0 or more"),
        (["--config.data.mixture.draw=lots"], "mixture.draw='lots' is not of type float"),
        (["--config.optimizer.grad_accum_steps=5"], "batch_size=12 is not a multiple of"),
        (["--config.sampling.guidance_low=2.0"], "must be ordered and between 0 and 1"),
        (["--config.loss.text_weight=0", "--config.loss.image_weight=0"], "nothing to train"),
    ],
)
def test_an_error_is_one_sentence(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(DIGITS, overrides)


def test_a_missing_file_or_size_is_named():
    with pytest.raises(InputError, match=r"nowhere\.py: no such file"):
        load_config("nowhere.py", [])
    with pytest.raises(InputError, match="there is no size 'huge'; there are tiny"):
        load_config(f"{DIGITS}:huge", [])


def test_overrides_are_applied_and_json_round_trips():
    config = load_config(
        DIGITS, ["--config.model.mlp_dim=64", "--config.optimizer.learning_rate=1"]
    )
    assert config.model.mlp_dim == 64 and config.optimizer.learning_rate == 1.0
    assert make_config(json.loads(config.to_json())) == config


def test_every_config_file_makes_a_config():
    files = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "common.py")
    assert files
    for file in files:
        load_config(str(file), [])
        if file.name == "finetune.py":  # its argument is a workdir
            with pytest.raises(InputError, match="huge is not a workdir to start from"):
                load_config(f"{file}:huge", [])
            continue
        if file.name == "pictures.py":  # its argument is a folder of records
            with pytest.raises(InputError, match="huge has no complete records"):
                load_config(f"{file}:huge", [])
            continue
        load_config(f"{file}:tiny", [])
        with pytest.raises(InputError, match=r"there is no .* 'huge'; there are "):
            load_config(f"{file}:huge", [])


def test_the_config_of_pictures_follows_from_the_records(tmp_path):
    """Size, channels, mixture, row length and steps: twice the pictures are twice the steps."""

    def write(name, count, *shape, caption="a cat", **moments):
        image = Image(np.zeros(shape, np.uint8), denoise=True, **moments)
        write_records(tmp_path / name, [[Prompt(("a", caption)), image]] * count)

    def load(*names):
        folders = ",".join(str(tmp_path / name) for name in names)
        return load_config(f"{ROOT}/configs/pictures.py:{folders}", [])

    write("one", 200, 32, 32, 3)
    write("two", 400, 32, 32, 3)
    one, two, both = load("one"), load("two"), load("one", "two")
    assert (one.data.image_size, one.model.channels, one.model.patch_size) == (32, 3, 4)
    assert one.validation.prompts == ("a",) and one.validation.every == one.checkpoint_every
    assert one.data.records == {"one": str(tmp_path / "one")} and not one.data.sample_latents
    # 64 patches; <s>, </s>, the caption's </s>, TIME, <|im_start|>, <|im_end|>; two a row, or more.
    length = 64 + 6 + len("a cat")
    assert one.data.max_seq_len == 160 and 2 * length <= 160 < 2 * length + 32
    visits = one.steps * one.batch_size * one.data.max_seq_len / length / 200
    assert visits == pytest.approx(220, rel=0.05)
    assert two.steps == pytest.approx(2 * one.steps, rel=0.05)
    assert both.data.mixture == {"one": 200, "two": 400} and both.steps > two.steps
    write("grey", 2, 9, 9, 1, caption="long " * 100)
    grey = load("grey")
    assert (grey.data.image_size, grey.model.channels, grey.model.patch_size) == (9, 1, 1)
    assert grey.data.max_seq_len >= 81 + 6 + 500 and grey.steps == 500
    latent = np.zeros((32, 32, 4), np.float32)
    write_records(tmp_path / "latents", [[Prompt(("a",)), Image(latent, True, latent)]])
    latents = load("latents")
    assert (latents.model.channels, latents.model.patch_size) == (4, 2)
    assert latents.data.sample_latents and latents.data.max_seq_len >= 2 * 256
    write_records(tmp_path / "texts", [["a text"]])
    with pytest.raises(InputError, match="texts holds no images"):
        load("texts")
    with pytest.raises(InputError, match="two folders have one name"):
        load("one", "one")


@pytest.mark.parametrize("name", ["imagenet256", "journeydb_ultrachat", "llava_journeydb"])
def test_the_large_configs_differ_by_slice_and_size(name):
    """More chips: more rows, fewer steps and a higher rate; "paper" has the original's."""
    made = {
        target: load_config(f"{ROOT}/configs/{name}.py:{target}", [])
        for target in ("v5e-64", "v6e-64", "v5e-256", "7b", "paper")
    }
    paper = made.pop("paper")
    assert (paper.batch_size, paper.steps, paper.optimizer.learning_rate) == (32, 500_000, 1e-4)
    for c in made.values():
        assert c.data.max_seq_len % 128 == 0
        larger = paper.steps / c.steps
        tokens = c.batch_size * c.data.max_seq_len / (32 * paper.data.max_seq_len)
        assert larger == pytest.approx(tokens, rel=0.05)
        assert c.optimizer.learning_rate == pytest.approx(1e-4 * larger**0.5, rel=1e-4)
    small, large = made["v5e-64"], made["7b"]
    # It has less memory to save in, and another number of layers.
    size = named_size("7b") | {"remat": large.model.remat, "scan_unroll": large.model.scan_unroll}
    assert dataclasses.replace(small.model, **size) == large.model
    assert large.data.max_seq_len == 4096
    assert set(small.data.mixture) == set(small.data.records)


def test_every_key_is_used():
    text = "\n".join(
        path.read_text()
        for path in (ROOT / "monoformer_jax").rglob("*.py")
        if path.name not in ("config.py", "cli.py")
    )

    default = make_config({})

    def keys(cls):
        for field in dataclasses.fields(cls):
            group = getattr(default, field.name, None) if cls is Config else None
            if dataclasses.is_dataclass(group):
                yield from keys(type(group))
            else:
                yield field.name

    # `name` is for readers of config.json; the other two are used in properties.
    known = {"name", "vocab_size", "patch_size"}
    unread = [k for k in keys(Config) if k not in known and not re.search(rf"\.{k}\b", text)]
    assert not unread


def parameters(config: MonoFormerConfig) -> int:
    shapes = jax.eval_shape(lambda: monoformer.init(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_tinyllama_has_the_parameters_of_the_published_model():
    """1,100,048,384 of TinyLlama, and 21,624,864 of the released MonoFormer's own modules."""
    config = MonoFormerConfig(**named_size("tinyllama_1b"), predict_variance=True)
    padding = 2 * (config.padded_vocab - config.vocab_size) * config.embed_dim
    assert parameters(config) - padding == 1_121_673_248


def test_7b_has_the_parameters_of_llama():
    """6,738,415,616 of LLaMA-7B with its vocabulary of 32,000."""
    config = MonoFormerConfig(**named_size("7b") | {"vocab_size": 32_000})
    D, P = config.embed_dim, config.layout.patch_dim
    time = (256 * D + D) + (D * D + D)
    own = time + 2 * (D * D + D) + (P * D + D) + (D * 2 * D + 2 * D) + (D * P + P)
    assert parameters(config) - own == 6_738_415_616
