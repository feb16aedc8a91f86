"""Train step, checkpoints and loop: one compilation, same losses on any mesh, bit-exact resume."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.parallel import check_batch_size, logical_shardings, make_mesh, put_batch
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.faults import NonFiniteLoss
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.runtime.workdir import claim_workdir
from monoformer_jax.training.loop import train
from monoformer_jax.training.metrics import Writer
from monoformer_jax.training.optimizer import learning_rate, make_optimizer
from monoformer_jax.training.state import abstract_train_state, init_train_state, make_train_step


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def run_steps(config, mesh, steps):
    batches = Batches(config, ByteTokenizer())
    state, train_step, losses = init_train_state(config, mesh), make_train_step(config, mesh), []
    for _ in range(steps):
        state, metrics = train_step(state, put_batch(next(batches.iterator), mesh))
        losses.append(float(metrics.compute()["loss"]))
    return losses, state, train_step


@pytest.fixture(scope="module")
def reference(config):
    return run_steps(config, one_device(), 3)


@pytest.mark.parametrize("axes", [pytest.param((4, 1, 1), marks=pytest.mark.slow), (1, 2, 2)])
def test_any_mesh_has_the_same_losses_with_one_compilation(config, reference, axes):
    mesh = make_mesh(MeshConfig(*axes))
    losses, state, train_step = run_steps(config, mesh, 3)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert train_step._cache_size() == 1
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params)):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(change, reference):
    config = change(optimizer={"grad_accum_steps": 2})
    losses, _, train_step = run_steps(config, one_device(), 3)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert train_step._cache_size() == 1


def test_the_step_is_adamw_with_clipping_and_an_average(change):
    """Two steps of the update rules, written out, with fixed gradients."""
    config = change(
        optimizer={"warmup_steps": 0, "schedule": "constant", "clip_norm": 0.5, "ema_decay": 0.9}
    )
    c = config.optimizer
    axes = {"matrix": ("embed", "mlp"), "scale": ("layers", "norm")}
    params = {"matrix": jnp.array([[1.0, -2.0]]), "scale": jnp.array([[3.0, 1.0]])}
    grads = {"matrix": jnp.array([[0.6, 0.0]]), "scale": jnp.array([[0.0, -0.8]])}  # norm 1
    optimizer = make_optimizer(c, config.steps, axes)
    state, got = optimizer.init(params), params
    m = v = jax.tree.map(jnp.zeros_like, params)
    want = params
    for n in (1, 2):
        updates, state = optimizer.update(grads, state, got)
        got = optax.apply_updates(got, updates)
        g = jax.tree.map(lambda g: 0.5 * g, grads)
        m = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, m, g)
        v = jax.tree.map(lambda v, g: c.b2 * v + (1 - c.b2) * g * g, v, g)
        step = jax.tree.map(
            lambda m, v, n=n: (m / (1 - c.b1**n)) / (jnp.sqrt(v / (1 - c.b2**n)) + 1e-8), m, v
        )
        decay = {"matrix": c.weight_decay, "scale": 0.0}
        want = {
            k: want[k] - c.learning_rate * (step[k] + decay[k] * want[k]) for k in want
        }  # norm scales do not decay
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_the_first_moment_may_be_bfloat16(change):
    config = change(optimizer={"first_moment_dtype": "bfloat16"})
    state = abstract_train_state(config, one_device())
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
                if hasattr(s, "mu"))  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def test_learning_rate_warms_up_and_falls_as_a_cosine(change):
    c = change(
        optimizer={"warmup_steps": 10, "final_fraction": 0.1, "learning_rate": 2.0}
    ).optimizer
    rate = learning_rate(c, 110)
    assert float(rate(0)) == 0 and float(rate(5)) == pytest.approx(1.0)
    want = 2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 25 / 100)) / 2)
    assert float(rate(35)) == pytest.approx(want, rel=1e-5)
    assert float(rate(110)) == pytest.approx(0.2)


def test_ema_follows_the_parameters(config, reference):
    """After the ramp's first steps it is their weighted mean; here from the recorded parameters."""
    batches, mesh = Batches(config, ByteTokenizer()), one_device()
    state, train_step = init_train_state(config, mesh), make_train_step(config, mesh)
    want = jax.tree.map(np.asarray, state.params)
    for step in range(2):
        state, _ = train_step(state, put_batch(next(batches.iterator), mesh))
        decay = min(config.optimizer.ema_decay, (1 + step) / (10 + step))
        want = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), want, state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, state.ema)


def test_parameters_moments_and_ema_are_sharded_by_the_rules(config):
    mesh = make_mesh(MeshConfig(1, 2, 2))
    state = init_train_state(config, mesh)
    down = state.params["decoder"]["layers"]["mlp"]["down"]
    assert down.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert down.addressable_shards[0].data.shape == (2, 32, 16)
    mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
              if hasattr(s, "mu"))  # fmt: skip
    for tree in (state.ema, mu):
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), state.params, tree)


def test_sharding_errors_name_the_parameter(config, change):
    mesh = make_mesh(MeshConfig(1, 1, 4))
    with pytest.raises(ValueError, match=r"attention/k: its axis kv_heads of 2 is not divisible"):
        abstract_train_state(config, mesh)
    with pytest.raises(ValueError, match="a: no rule for its axis 'colour'"):
        shape = jax.ShapeDtypeStruct((4,), jnp.float32)
        logical_shardings({"a": ("colour",)}, {"a": shape}, mesh)
    with pytest.raises(InputError, match="mesh data=3, fsdp=1, tensor=1 does not fit 4 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(InputError, match="at most one may be -1"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))
    with pytest.raises(InputError, match=r"batch_size=6 is not a multiple .* 4 devices"):
        check_batch_size(6, 1, make_mesh(MeshConfig()))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A finished run of 20 steps with checkpoints at 10 and 20, for tests that do not change it."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train(config, workdir)
    return workdir


def test_the_loss_falls_and_is_reported_every_step(trained):
    reported = lines(trained)
    assert [line["step"] for line in reported] == list(range(1, 21))
    losses = [line["loss"] for line in reported]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert all(0.5 < line["real_token_share"] <= 1 for line in reported)
    assert list((trained / "tensorboard").glob("events*"))


def test_an_interrupted_run_resumes_bit_exactly(trained, config, tmp_path):
    """Restarted after step 10: the last ten losses and the weights are bit-identical."""
    workdir = tmp_path / "cut"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    train(config, workdir)
    assert [line["loss"] for line in lines(workdir)] == [line["loss"] for line in lines(trained)]
    for a, b in zip(
        jax.tree.leaves(load_trained(workdir)[1]), jax.tree.leaves(load_trained(trained)[1])
    ):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_changed(trained, config, tmp_path):
    workdir = tmp_path / "done"
    shutil.copytree(trained, workdir)
    train(config, workdir)
    assert lines(workdir) == lines(trained)


def test_a_workdir_of_another_model_is_not_changed(trained, change):
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    with pytest.raises(InputError, match=r"holds another run: model.mlp_dim \(was 64, now 128\)"):
        train(change(model={"mlp_dim": 128}), trained)
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before


def test_more_steps_are_allowed_and_checkpoints_without_config_are_not(trained, change, tmp_path):
    workdir = tmp_path / "more"
    workdir.mkdir()
    shutil.copy(trained / "config.json", workdir)
    claim_workdir(workdir, change(steps=40))
    assert json.loads((workdir / "config.json").read_text())["steps"] == 40
    (workdir / "config.json").unlink()
    shutil.copytree(trained / "checkpoints", workdir / "checkpoints")
    with pytest.raises(InputError, match=r"no config"):
        claim_workdir(workdir, change(steps=40))


def test_an_incomplete_checkpoint_is_ignored(trained, tmp_path):
    workdir = tmp_path / "killed"
    shutil.copytree(trained, workdir)
    complete = workdir / "checkpoints" / "20"
    complete.rename(complete.with_name("20.orbax-checkpoint-tmp"))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest == 10


def test_a_non_finite_loss_stops_the_run_before_it_is_saved(change, tmp_path):
    config = change(optimizer={"learning_rate": 1e15, "warmup_steps": 0}, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss) as stopped:
        train(config, tmp_path / "nan")
    message = str(stopped.value)
    step, good = map(int, re.search(r"at step (\d+); checkpoint (\d+) is good", message).groups())
    assert good == step - 1
    assert "<image 16>" in message
    with Checkpoints(tmp_path / "nan") as checkpoints:
        assert checkpoints.latest == good


def test_metrics_after_the_restart_step_are_removed(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    writer = Writer(tmp_path, step=1)
    writer.write_scalars(2, {"loss": 1.5})
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]


def test_sampling_uses_the_ema_weights(trained, config):
    _, ema, meta = load_trained(trained)
    with Checkpoints(trained) as checkpoints:
        batches = Batches(config, ByteTokenizer())
        state, _, _ = checkpoints.restore(
            abstract_train_state(config, make_mesh(MeshConfig())), batches.iterator
        )
    assert meta["step"] == 20
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema)
    fresh = monoformer.init(config.model, jax.random.key(config.seed))
    assert not np.array_equal(ema["text_head"], fresh["text_head"])
    assert not np.array_equal(ema["text_head"], state.params["text_head"])
