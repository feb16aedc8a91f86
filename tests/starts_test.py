"""Starts of a run: from a LLaMA, on devices that do not fit, from a finished run; what is refused
leaves no folder behind."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
from conftest import REFERENCE, ROOT
from convert_test import write_words

from monoformer_jax.cli import load_config
from monoformer_jax.data.documents import Image, Prompt
from monoformer_jax.data.records import write_file
from monoformer_jax.errors import InputError
from monoformer_jax.models import make_config, trainable
from monoformer_jax.parallel import make_mesh
from monoformer_jax.pretrained.conversion import find_source, open_source, write_workdir
from monoformer_jax.runtime.weights import check_init_from, load_weights
from monoformer_jax.runtime.workdir import claim_workdir, mark_done, read_config
from monoformer_jax.training.loop import train
from monoformer_jax.training.optimizer import learning_rate
from monoformer_jax.training.state import check_layout

DDPM = ["--config.objective.kind=ddpm", "--config.objective.learn_sigma=True",
        "--config.sampling.solver=ddpm"]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The recorded tiny LLaMA with a tokenizer, converted."""
    source, to = (tmp_path_factory.mktemp("llama") / name for name in ("theirs", "ours"))
    source.mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(REFERENCE / "llama_tiny" / name, source)
    write_words(source / "tokenizer.json", 131, [])
    write_workdir(to, open_source(find_source(str(source))))
    return to


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three captioned latents of 8×8×4."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    examples = [
        [Prompt(("w5 w6",)), Image(rng.normal(size=(8, 8, 4)), True, np.zeros((8, 8, 4)))]
        for _ in range(3)
    ]
    write_file(folder / "records-00000-of-00001.array_record", examples)
    (folder / "info.json").write_text(json.dumps({"examples": 3, "files": 1, "shape": [8, 8, 4]}))
    return folder


def start_of(name, llama, records, *overrides):
    """The docstring's command of a config, with the model and the data of the test."""
    lines = (ROOT / "configs" / f"{name}.py").read_text().partition('"""')[2].replace("\\\\\n", "")
    command = next(line for line in lines.splitlines() if "monoformer_jax.train" in line)
    flags = [word for word in shlex.split(command) if word.startswith("--config.")]
    assert flags == ["--config.init_from=runs/tinyllama"]
    like = read_config(llama).model
    widths = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
              "vocab_size", "norm_eps", "rope_theta")  # fmt: skip
    tiny = [f"--config.model.{width}={getattr(like, width)}" for width in widths]
    tiny += ["--config.data.image_size=8", "--config.data.max_seq_len=64", "--config.steps=1",
             "--config.batch_size=4", "--config.checkpoint_every=1", "--config.log_every=1",
             "--config.data.mixture={'any': 1.0}", f"--config.data.records.any={records}",
             "--config.model.dtype=float32"]  # fmt: skip
    return load_config(
        str(ROOT / "configs" / f"{name}.py"), [f"--config.init_from={llama}", *tiny, *overrides]
    )


@pytest.mark.parametrize(
    "name, overrides, outputs",
    [
        ("imagenet256", DDPM, 32),
        ("journeydb_ultrachat", [], 16),
        ("llava_journeydb", ["--config.model.patch_size=1", "--config.data.max_seq_len=128"], 4),
    ],
)
def test_a_fresh_head_takes_the_objective_and_the_latents_of_the_run(
    name, overrides, outputs, llama, records
):
    config = start_of(name, llama, records, *overrides)
    target = trainable.abstract(config.model, config.lora, make_mesh(config.mesh))
    assert target["image_head"]["out"]["kernel"].shape == (64, outputs)
    loaded = load_weights(llama, target, config.model)
    assert loaded.keys() == {"token_embedding", "decoder", "text_head"}
    with pytest.raises(InputError, match=r"another model: rope_theta \(was 10000.0, now 1.0\)"):
        check_init_from(llama, dataclasses.replace(config.model, rope_theta=1.0))


def test_a_trained_head_is_not_replaced(tmp_path, llama):
    """The released weights predict a variance: an objective without one is refused, as before."""
    write_workdir(tmp_path / "ours", open_source(find_source(str(REFERENCE / "tiny_a"))))
    model = read_config(tmp_path / "ours").model
    assert check_init_from(tmp_path / "ours", model) == []
    with pytest.raises(InputError, match=r"predict_variance \(was True, now False\)"):
        check_init_from(tmp_path / "ours", dataclasses.replace(model, predict_variance=False))
    # A copy still knows which modules are new.
    write_workdir(tmp_path / "copy", open_source(find_source(str(llama))))
    assert "image_head" in check_init_from(tmp_path / "copy", read_config(llama).model)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.init_from=nowhere"], "nowhere holds no trained model"),
        (["--config.model.num_layers=2"], r"holds another model: num_layers \(was 3, now 2\)"),
        (["--config.data.tokenizer=bytes"], "was trained with tokenizer.json: set --config.data.tok"),
        (["--config.data.tokenizer=other.json"], "the tokenizer other.json does not exist"),
        (["--config.data.records.any=nowhere"], "nowhere"),
        (["--config.batch_size=6"], r"batch_size=6 is not a multiple .*; these fit: --config"),
        (["--config.optimizer.restart_step=1", "--config.steps=2",
          "--config.optimizer.schedule=cosine"], "restart_step=1 extends a finished run"),
    ],
)  # fmt: skip
def test_a_refused_start_leaves_no_workdir(overrides, message, llama, records, tmp_path):
    config = start_of("imagenet256", llama, records, *overrides)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"mesh": {"data": 3}}, "mesh data=3, fsdp=1, tensor=1 does not fit 4 devices"),
        ({"mesh": {"tensor": 4}}, "axis kv_heads of 2 is not divisible by mesh.tensor=4"),
        ({"mesh": {"slices": 2}}, "mesh.slices=2, but the devices are in 1 slices"),
        ({"batch_size": 6, "data": {"streams": 3}}, "batch_size=6 is not a multiple"),
        ({"batch_size": 4, "optimizer": {"grad_accum_steps": 2}}, "grad_accum_steps=2 times the 4"),
    ],
)
def test_a_layout_that_does_not_fit_names_one_that_does(groups, message, change):
    config = change(**groups)
    with pytest.raises(InputError, match=message) as refused:
        check_layout(config)
    assert "\n" not in str(refused.value)
    values = config.to_dict()
    for flag in str(refused.value).partition("; these fit: ")[2].split():
        *groups, key = flag.partition("=")[0].removeprefix("--config.").split(".")
        (values[groups[0]] if groups else values)[key] = int(flag.partition("=")[2])
    fitting = make_config(values)
    assert check_layout(fitting).size == 4
    assert fitting.batch_size - config.batch_size <= 6


def test_streams_and_micro_batches_that_do_not_divide_the_batch_name_one_that_they_do(change):
    with pytest.raises(InputError, match=r"multiple of data.streams=3; batch_size=6 is"):
        change(batch_size=4, data={"streams": 3}, optimizer={"grad_accum_steps": 2})


def test_a_finished_cosine_is_extended_only_by_a_restart(change, tmp_path):
    run = tmp_path / "run"
    short = change(steps=1400, optimizer={"learning_rate": 1e-3, "warmup_steps": 100})
    claim_workdir(run, short)
    (run / "checkpoints" / "1400").mkdir(parents=True)
    mark_done(run, short, 1400, 1.0)
    longer = dataclasses.replace(short, steps=2800)
    for _ in range(2):
        with pytest.raises(InputError, match=r"would jump .*--config.optimizer.restart_step=1400"):
            claim_workdir(run, longer)
        assert read_config(run) == short and (run / "done.json").exists()
    early = dataclasses.replace(
        longer, optimizer=dataclasses.replace(short.optimizer, restart_step=9)
    )
    with pytest.raises(InputError, match=r"restart_step \(was 0, now 9\)"):
        claim_workdir(run, early)
    again = dataclasses.replace(
        longer, optimizer=dataclasses.replace(short.optimizer, restart_step=1400)
    )
    for _ in range(2):  # the second is a resumed start
        claim_workdir(run, again)
    assert read_config(run) == again and not (run / "done.json").exists()
    rate, before = learning_rate(again.optimizer, 2800), learning_rate(short.optimizer, 1400)
    np.testing.assert_allclose(
        [rate(1400), rate(1450), rate(1500), rate(2800)],
        [before(1400), 0.5e-3, 1e-3, 0], rtol=1e-5, atol=1e-8,
    )  # fmt: skip
