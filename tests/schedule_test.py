"""The predicted step of `plan`: a schedule counted by hand, links, compiler options and the search."""

import json
import types

import jax
import numpy as np
import pytest

from monoformer_jax import cli
from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError
from monoformer_jax.parallel import make_mesh
from monoformer_jax.planning import choose
from monoformer_jax.planning.hardware import CHIPS, all_chips, link_gbs
from monoformer_jax.planning.rows import assumed_rows
from monoformer_jax.planning.schedule import predict
from monoformer_jax.runtime import compiler

V5E = CHIPS["v5e"]
# A loop of 3 turns. A gather of 1.5 MB is sent while products of 15,000 cycles run; a sum of 3 MB is
# waited for; a second gather overlaps the first. 15,000 cycles are 10 microseconds.
HLO = """
%start (p: bf16[8]) -> bf16[8] {
  %g = bf16[1000000]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %c = bf16[8] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%done (p: bf16[8]) -> bf16[8] {
  %g.1 = bf16[1000000]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = bf16[8] custom-call(%g.1), custom_call_target="AsyncCollectiveDone"
}
%product (p: bf16[8]) -> bf16[8] {
  ROOT %d = bf16[8] convolution(%p, %p), dim_labels=bf_io->bf
}
%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %s = bf16[8] fusion(%x), kind=kCustom, calls=%start
  %m = bf16[8] fusion(%x), kind=kOutput, calls=%product, metadata={op_name="jit(step)/jvp()/while/body/dot_general"}, backend_config={"estimated_cycles":"15000"}
  %e = bf16[8] fusion(%s), kind=kCustom, calls=%done
  %r = bf16[1000000]{0} all-reduce(%m), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %n = bf16[8] fusion(%x), kind=kLoop, calls=%other, metadata={op_name="jit(step)/jvp()/while/body/norm/mul"}, backend_config={"estimated_cycles":"1500"}
  %k = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/while/body/kernel"}
  ROOT %t = (s32[], bf16[8]) tuple(%i, %n)
}
%condition (p: (s32[], bf16[8])) -> pred[] {
  %n.1 = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n.1), direction=LT
}
ENTRY %main (p: bf16[8]) -> bf16[8] {
  %w = (s32[], bf16[8]) while(%t0), condition=%condition, body=%body
  %b = bf16[8]{0} broadcast(%zero), dimensions={}, backend_config={"estimated_cycles":"3000"}
}
"""  # noqa: E501
# A SparseCore sums 2 MB, of which each of four chips keeps its quarter, from the update on, which has
# the operand; a second sum and its slices, in one fusion, are waited for.
OFFLOADED = """
%sum (p: bf16[1000000]) -> bf16[250000] {
  ROOT %r = bf16[250000]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
%offload (p: bf16[1000000]) -> bf16[250000] {
  ROOT %c = bf16[250000]{0} custom-call(%p), custom_call_target="offload", called_computations={%sum}
}
%all-reduce-scatter.1 (p: bf16[1000000]) -> bf16[250000] {
  %r.1 = bf16[1000000]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %k = bf16[250000]{0} dynamic-slice(%r.1, %i), dynamic_slice_sizes={250000}
}
%product (p: bf16[8]) -> bf16[8] {
  ROOT %d = bf16[8] convolution(%p, %p), dim_labels=bf_io->bf
}
ENTRY %main (p: bf16[8]) -> bf16[8] {
  %s = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%offload
  %m = bf16[8] fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"15000"}
  %u = ((bf16[1000000]{0}), bf16[250000]{0}, (s32[8]{0})) async-update(%s, %m)
  %n = bf16[8] fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"15000"}
  %e = bf16[250000]{0} async-done(%u)
  %f = bf16[250000]{0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def slice_of(topology, **axes):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    return make_mesh(MeshConfig(**axes), all_chips(topology))


def test_the_prediction_of_a_schedule_is_what_is_counted_by_hand():
    mesh = slice_of("v5e:2x2", data=1, fsdp=4)
    one = predict(HLO, mesh, V5E, {"k": 5e-6})
    # Four chips in a square have two links each, 100 GB/s: 1.5 MB in 15 us, of which 10 are hidden.
    assert {name: round(1e6 * s, 3) for name, s in one.compute.items()} == {
        "forward": 30, "norm": 3, "fills": 2, "other": 15,
    }  # fmt: skip
    gather, reduce = one.transfers
    assert (gather.gbs, gather.hidden_by, gather.asynchronous) == (100, "forward", True)
    np.testing.assert_allclose([gather.seconds, gather.exposed], [15e-6, 5e-6])
    np.testing.assert_allclose([reduce.seconds, reduce.exposed], [30e-6, 30e-6])
    np.testing.assert_allclose(one.seconds, 1e-6 * (30 + 3 + 2 + 15 + 3 * (5 + 30)))
    np.testing.assert_allclose(one.synchronous, 90e-6)
    assert [span.collective for span in one.spans["body"]].count(True) == 2


def test_a_sum_on_a_sparse_core_and_one_in_a_fusion():
    one = predict(OFFLOADED, slice_of("v5e:2x2", data=1, fsdp=4), V5E)
    kinds = [(x.collective.kind, x.collective.size, x.asynchronous) for x in one.transfers]
    assert kinds == [("reduce-scatter", 2e6, True), ("reduce-scatter", 2e6, False)]
    # Each sends 1.5 MB in 15 us; 10 of the first are hidden by the second product.
    np.testing.assert_allclose([x.exposed for x in one.transfers], [5e-6, 15e-6])
    np.testing.assert_allclose(one.seconds, 1e-6 * (10 + 10 + 5 + 15))


@pytest.mark.parametrize(
    "topology, axes, gbs",
    [
        ("v5e:8x8", {"fsdp": 64, "data": 1}, 100),  # an open mesh: one link in either direction
        ("v5e:16x16", {"fsdp": 256, "data": 1}, 200),  # rings
        ("v5e:8x16", {"fsdp": 128, "data": 1}, 150),
        ("v5p:4x4x4", {"fsdp": 64, "data": 1}, 600),
        ("v5p:2x2x4", {"fsdp": 16, "data": 1}, 300),
    ],
)
def test_links_that_a_group_can_use(topology, axes, gbs):
    mesh = slice_of(topology, **axes)
    chip = CHIPS[topology.split(":")[0]]
    assert link_gbs(chip, mesh, range(mesh.size)) == gbs


def test_a_group_along_one_direction_has_its_links_alone():
    mesh = slice_of("v5e:8x8", data=8, fsdp=8)
    assert link_gbs(V5E, mesh, range(8)) == 50
    row = [n for n, d in enumerate(mesh.devices.flat) if d.coords[0] == 0]
    assert link_gbs(V5E, mesh, row) == 50


def test_an_option_that_the_compiler_does_not_know(capsys, monkeypatch):
    """From the table: a warning, and the rest; from the config: one sentence."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    device = all_chips("v5e:2x2")[0]
    kept = {"xla_tpu_prefer_async_allgather_to_allreduce": "true"}
    monkeypatch.setitem(compiler.OPTIONS, device.device_kind, {"xla_unknown": "1"} | kept)
    compiler._options.cache_clear()
    assert compiler.compiler_options("", device) == kept
    assert "WARNING: compiling without xla_unknown" in capsys.readouterr().err
    for text, message in (
        ("xla_mine=1", "No such compile option: 'xla_mine'"),
        ("xla_enable_async_all_reduce=7x", "TPU v5 lite: .*xla_enable_async_all_reduce"),
        ("xla_mine", "'xla_mine' is not NAME=VALUE"),
    ):
        with pytest.raises(InputError, match=message):
            compiler.compiler_options(text, device)
    (name,) = kept
    assert compiler.compiler_options(f"{name}=false", device)[name] == "false"
    compiler._options.cache_clear()


def test_options_that_the_compiler_refuses_together():
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    own = ",".join(f"{name}={value}" for name, value in compiler.OPTIONS["TPU v5e"].items())
    with pytest.raises(InputError, match=r"compiler_options: TPU v6 lite: .*not supported"):
        compiler.compiler_options(own, all_chips("v6e:2x2")[0])


def test_an_error_of_the_compiler_with_a_known_remedy(capsys):
    def fails(message):
        def main(_):
            raise jax.errors.JaxRuntimeError(message)

        return lambda: cli.call_command("train", None, lambda parser: None, main, [])

    assert fails("fusion.1 requires allocation in the alternate memory, which could not")() == 2
    assert "smaller model.scan_unroll" in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError):
        fails("another error")()


def test_a_cpu_has_no_options():
    assert compiler.compiler_options("", jax.devices()[0]) == {}


def test_assumed_rows_are_full_of_documents():
    rows = assumed_rows(100, 17, 1)
    assert rows.images == 2 and rows.real_token_share == 0.74 and rows.assumed
    assert rows.text.sum() == 2 * (16 + 4)
    (mask,) = rows.masks
    assert (mask.stop[0, 37:74] > 37).all() and (mask.start[0, 37:74] == 37).all()


def test_the_search_takes_the_least_time_that_leaves_a_tenth(config, tmp_path):
    """With a fake compiler: more recomputation takes more time and less memory; a cache is used."""
    asked = []

    def compile_(changed):
        asked.append(changed)
        number = choose.REMATS.index(changed.model.remat)
        return {"peak_gib": 10 - number, "hbm_gib": 10.0, "useful_mfu": 1,
                "predicted_step_ms": 100 + number, "exposed_collective_ms": 1}  # fmt: skip

    changes = [{"model.remat": remat} for remat in choose.REMATS]
    options = {"estimate": compile_, "cache": tmp_path / "cache.json", "minutes": 1.0}
    results = choose.search(config.to_dict(), changes[:2], "v5e:2x2", **options)
    assert choose.choose(results).change == changes[1]
    results = choose.search(config.to_dict(), changes, "v5e:2x2", **options)
    assert len(asked) == len(changes)  # each was compiled once
    best = choose.choose(results)
    assert best.change == changes[1] and best.found["predicted_step_ms"] == 101
    assert choose.arguments(best.change) == [f"--config.model.remat={choose.REMATS[1]}"]
    assert set(json.loads((tmp_path / "cache.json").read_text()).popitem()[1]) == set(choose.KEYS)
    with pytest.raises(InputError, match="none of 1 candidates leaves 10% of HBM free"):
        choose.choose(results[:1])


def test_a_search_longer_than_the_time_given(config, tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 300))
    monkeypatch.setattr(choose, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    found = {"peak_gib": 1.0, "hbm_gib": 10.0}
    changes = [{"model.remat": remat} for remat in choose.REMATS]
    with pytest.raises(InputError, match="--search: 3 more compilations take about 15 minutes"):
        choose.search(config.to_dict(), changes, "v5e:2x2", estimate=lambda _: found,
                      cache=tmp_path / "cache.json", minutes=10)  # fmt: skip


def test_candidates_are_distinct_configs(config):
    changes = list(choose.candidates(config.to_dict(), 4, [1, 2]))
    made = [choose.with_values(config.to_dict(), change) for change in changes]
    assert len({json.dumps(one.to_dict()) for one in made}) == len(made) >= 8
    assert {one.batch_size for one in made} == {4, 8}
