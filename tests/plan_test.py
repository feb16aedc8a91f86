"""`plan`: compiler results against manual counts, and suggestions for a run that does not fit."""

import argparse
import contextlib
import dataclasses
import io
import json
import math

import jax
import pytest
from conftest import ROOT
from fixtures import logits_of

from monoformer_jax import plan
from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import MonoFormerConfig
from monoformer_jax.parallel import make_mesh
from monoformer_jax.planning.collectives import collectives
from monoformer_jax.planning.estimate import Estimate
from monoformer_jax.planning.hardware import CHIPS, all_chips

TINY = f"--config={ROOT / 'configs' / 'digits.py:tiny'}"
KEYS = {"fits", "hbm_gib", "peak_gib", "arguments_gib", "temporaries_gib", "parameters",
        "flops_per_step", "compile_seconds", "step_seconds_floor", "hosts", "streams",
        "host_images_per_s", "real_token_share", "predicted_step_ms", "exposed_collective_ms",
        "useful_mfu", "useful_images_per_s"}  # fmt: skip


def run(*arguments):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args, rest = parser.parse_known_args([TINY, *arguments])
    args.overrides = rest
    return plan.main(args)


FSDP = "mesh data=1, fsdp=4, tensor=1"


@pytest.fixture(scope="module")
def fitting(tmp_path_factory):
    """The figures of a run on a mesh of fsdp=4, and what was printed."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    folder = tmp_path_factory.mktemp("plan")
    file, picture = folder / "plan.json", folder / "schedule.png"
    options = ["--json", str(file), "--price=1.5", "--picture", str(picture)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run("--topology=v5e:2x2", "--mesh", "fsdp=4,data=1", *options)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text()), said.getvalue()


@pytest.mark.slow
def test_a_run_that_fits(fitting, config):
    found, said = fitting
    assert set(found) == KEYS and found["fits"] and found["hbm_gib"] == 15.75
    shapes = jax.eval_shape(lambda: monoformer.init(config.model, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert found["parameters"] == count
    # Weights, EMA and two moments over four devices; small arrays are padded to full tiles.
    assert 16 * count / 4 < found["arguments_gib"] * 2**30 < 2**22
    assert 0 < found["temporaries_gib"] < found["peak_gib"] < 1
    assert found["step_seconds_floor"] > 16 * count / 4 * 2 / 819e9
    assert FSDP in said and "all-gather" in said
    assert (found["hosts"], found["streams"]) == (1, 1) and "hosts: 1, streams: 1" in said
    assert 0.9 < found["real_token_share"] <= 1
    # 4 rows in a step at half of the peak of 4 chips; most documents of the digits hold an image.
    rows = 4 * 4 * CHIPS["v5e"].tflops * 1e12 / 2 / found["flops_per_step"]
    assert 3 < found["host_images_per_s"] / rows < config.max_images
    assert 0 < found["exposed_collective_ms"] < found["predicted_step_ms"] < 100
    assert 0 < found["useful_mfu"] < 0.1 and "at $1.5 a chip-hour" in said
    # The mean of the rows' images over the predicted time.
    made = found["useful_images_per_s"] * found["predicted_step_ms"] / 1e3
    assert 3 * config.batch_size < made < config.max_images * config.batch_size


@pytest.mark.slow
def test_sample_mode(tmp_path, capsys, config):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    file = tmp_path / "plan.json"
    options = ["--mesh", "data=2,tensor=2", "--config.sampling.steps=3", "--json", str(file)]
    assert run("--topology=v5e:2x2", "--mode=sample", *options) == 0
    found = json.loads(file.read_text())
    # 16 images of 17 tokens, 3 steps with two model evaluations of two guidance branches.
    assert found["flops_per_step"] > 16 * 17 * 12 * monoformer.flops(config.model, tokens=1)
    assert "a call for 8 images per device takes at least" in capsys.readouterr().out


@pytest.mark.slow
def test_suggests_a_change_for_a_run_that_does_not_fit(fitting, capsys, monkeypatch):
    """The chip lacks so little memory that the first change, a smaller moment, is enough."""
    monkeypatch.setattr(plan, "SUGGESTIONS", 1)  # each suggestion is a compilation
    small = 0.997 * fitting[0]["peak_gib"]
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm_gib=small))
    assert run("--topology=v5e:2x2", "--mesh", "fsdp=4,data=1") == 2
    said = capsys.readouterr().out
    assert "TOO SMALL" in said
    offers = [line for line in said.splitlines() if "per step at least: --config." in line]
    assert len(offers) == 1 and "--config.optimizer.first_moment_dtype=bfloat16" in offers[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v5x:2x2"], "supported chips are v4, v5e, v5p, v6e, tpu7x; did you mean v5"),
        (["--topology=v5e:2x2x2"], "write it as v5e:8x8"),
        (["--topology=v5p:4x4"], "write it as v5p:2x2x2"),
        (["--topology=v5e:3x5"], "libtpu reports INVALID_ARGUMENT"),
        (["--topology=v5e:2x2", "--mesh=fsdp=3"], "fsdp=3, tensor=1 does not fit 4 devices"),
        (["--topology=v5e:2x2", "--mesh=colour=3"], "unknown config key mesh.colour"),
        (["--topology=v5e:2x2", "--mesh=tensor=4"], "kv_heads of 2 is not divisible"),
        (["--topology=v5e:2x4"], "batch_size=4 is not a multiple"),
        (
            ["--topology=v5e:4x4", "--config.batch_size=16", "--config.data.streams=2"],
            "4 hosts share data.streams=2 of batch_size=16: set --config.data.streams=4",
        ),
        (["--topology=v5e:2x2", "--json=nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments_raise_input_error(arguments, message):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    with pytest.raises(InputError, match=message):
        run(*arguments)


def test_a_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'monoformer_jax\[plan\]'"):
        all_chips("v5e:2x2")


@pytest.mark.parametrize("chip", CHIPS)
def test_libtpu_supports_every_chip(chip):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    devices = all_chips(f"{chip}:2x2" if chip in ("v5e", "v6e") else f"{chip}:2x2x1")
    assert len(devices) == (8 if chip == "tpu7x" else 4)
    assert chip != "v5e" or len(all_chips("v5e-16")) == 16


def test_suggestions_fit_and_are_sorted_by_step_time(config):
    """With a fake compiler and memory limit: only changes that may fit are compiled."""
    mesh = make_mesh(MeshConfig())
    config = dataclasses.replace(config, batch_size=32)
    chip = dataclasses.replace(CHIPS["v5e"], hbm_gib=10 / 2**30)
    first = Estimate(config, mesh, chip, False, 8, 8, 16, 0, 1, 1, 1, (), 0.0)
    asked = []

    def try_(changed):
        asked.append(changed)
        more = changed.optimizer.grad_accum_steps
        return dataclasses.replace(first, fits=more > 2, repeated_flops=1000 * more)

    def arguments_of(changed):
        return 8 // changed.mesh.fsdp

    found = plan.suggest(first, try_, arguments_of, "train")
    everything = " ".join(
        f"--config.{key}"
        for key in ("mesh.data=1", "mesh.fsdp=4", "optimizer.first_moment_dtype=bfloat16",
                    "model.remat=nothing_saveable", "optimizer.grad_accum_steps=4")
    )  # fmt: skip
    alone = "--config.optimizer.grad_accum_steps"
    assert [text for text, _ in found] == [f"{alone}=4", everything, f"{alone}=8"]
    # A change whose lower bound exceeds the memory is not compiled.
    assert not any(a.optimizer.grad_accum_steps == 2 and a.mesh.fsdp == 1 for a in asked)


def test_flops_match_xla_cost_analysis():
    """FLOPs of one layer and the text head against XLA's cost analysis of the forward pass."""
    c = MonoFormerConfig(num_layers=1, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
                    mlp_dim=256, channels=4, vocab_size=256, dtype="float32", remat="none")  # fmt: skip
    params = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((2, 64, 64), "float32")

    def forward(params, x):
        model = monoformer.bind(c, params)
        block = jax.tree.map(lambda leaf: leaf[0], model.decoder.layers)
        starts = jax.numpy.zeros((2, 64), int)
        from monoformer_jax.attention import IntervalMask

        mask = IntervalMask(starts, starts + 64)
        return logits_of(model, block(x, starts, mask, None, None, None)[0])

    counted = jax.jit(forward).lower(params, x).compile().cost_analysis()["flops"]
    tokens = 2 * 64
    want = monoformer.flops(c, tokens=tokens, pairs=64 * tokens, text=tokens)
    assert want < counted < 1.06 * want  # XLA also counts norms, RoPE and the softmax


HLO = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[4,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %a)
}
%started (p: f32[8]) -> f32[8] {
  %b = f32[8]{0} all-gather(%x), channel_id=2, replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="1"}
  ROOT %c = f32[8] custom-call(%b), custom_call_target="AsyncCollectiveStart"
}
%goes_on (p: f32[8]) -> f32[8] {
  %b.1 = f32[8]{0} all-gather(%x), channel_id=2, replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="1"}
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t0), condition=%condition, body=%body
  %f = f32[8] fusion(%p), kind=kLoop, calls=%started
  %g = f32[8] fusion(%p), kind=kLoop, calls=%goes_on
  %r = (f32[6]{0}, f32[2]{0}) all-reduce(%p, %q), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_once_per_loop_iteration():
    mesh = make_mesh(MeshConfig(1, 2, 2))
    found = {(one.kind, one.axes): one for one in collectives(HLO, mesh)}
    assert len(found) == 3
    looped = found["all-gather", ("fsdp",)]
    assert (looped.times, looped.size, looped.sent) == (7, 64, 7 * 32)
    assert found["all-gather", ("tensor",)].sent == 16  # one chain counts once
    assert found["all-reduce", ("fsdp",)].sent == 32  # 8 float32, reduce-scatter and all-gather
