"""Ahead-of-time compilation of the train step for a TPU slice, with sharded fused kernels."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="libtpu is for Linux only")


def compiled(topology, mesh, scan_unroll, num_layers):
    """Config, mesh, train step as `plan` compiles it, and its text."""
    import jax
    from jax.sharding import NamedSharding

    from monoformer_jax import batch as contract
    from monoformer_jax.config import Config, DataConfig, MeshConfig
    from monoformer_jax.models.monoformer import MonoFormerConfig
    from monoformer_jax.parallel import BATCH, make_mesh
    from monoformer_jax.planning.estimate import compile_scheduled
    from monoformer_jax.planning.hardware import all_chips
    from monoformer_jax.training.state import abstract_train_state, make_train_step

    model = MonoFormerConfig(num_layers=num_layers, embed_dim=256, num_heads=8, num_kv_heads=2,
                        head_dim=64, mlp_dim=512, channels=4, scan_unroll=scan_unroll)  # fmt: skip
    mesh = make_mesh(MeshConfig(*mesh), all_chips(topology))
    config = Config(batch_size=max(4, mesh.shape["fsdp"]), model=model,
                    data=DataConfig(image_size=32, max_seq_len=1024))  # fmt: skip
    fields = contract.spec(config.layout, config.batch_size, config.data.max_seq_len)
    rows = NamedSharding(mesh, BATCH)
    batch = {k: jax.ShapeDtypeStruct(f.shape, f.dtype, sharding=rows) for k, f in fields.items()}
    step = make_train_step(config, mesh).lower(abstract_train_state(config, mesh), batch)
    return config, mesh, *compile_scheduled(step)


def check_kernels() -> None:
    """Run by the test in a subprocess: a 4-chip v5e slice, fsdp 2 and tensor 2."""
    import math

    from monoformer_jax.planning.collectives import collectives
    from monoformer_jax.planning.estimate import bytes_on_device
    from monoformer_jax.training.state import abstract_train_state

    config, mesh, program, text = compiled("v5e:2x2", (1, 2, 2), scan_unroll=1, num_layers=2)
    assert "interval_attention_forward" in text and "interval_attention_backward" in text
    # Two rows per chip; one layer's dense float32 scores would be 2 · 4 heads · 1024² · 4 bytes.
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * 1024**2 * 4
    # Weights, EMA and moments are donated.
    state = abstract_train_state(config, mesh)
    assert memory.alias_size_in_bytes >= bytes_on_device(state)
    assert memory.argument_size_in_bytes - memory.alias_size_in_bytes < 2**21  # the batch

    # Every block has two reductions over tensor per pass and gathers no activation.
    stream = [config.model.embed_dim, config.data.max_seq_len, config.batch_size // 2]
    inside = [
        one
        for one in collectives(text, mesh)
        if "/while/body/" in one.where and "tensor" in one.axes and "shard_map" not in one.where
    ]
    large = [one for one in inside if one.size * mesh.size >= math.prod(stream)]
    assert {one.kind for one in large} <= {"all-reduce", "reduce-scatter"}, large
    forward = [one for one in large if "transpose" not in one.where]
    assert sum(one.times for one in forward) == 2 * config.model.num_layers

    # No gradient of 128 KiB is waited for.
    weights = check_transfers(text, mesh, "v5e")
    waited = [x for x in weights if not x.asynchronous and x.collective.size > 2**17]
    assert "all-reduce" not in {x.collective.kind for x in waited}, waited


def check_schedule(topology: str) -> None:
    """Run by the test in a subprocess: sharded weights, two blocks in a turn of the loop."""
    _, mesh, _, text = compiled(topology, (1, -1, 1), scan_unroll=2, num_layers=4)
    weights = check_transfers(text, mesh, topology.split(":")[0])
    # Nothing is waited for but the gradients of norms, which are smaller.
    waited = [x for x in weights if not x.asynchronous and x.collective.size > 2**13]
    assert not waited, waited
    # Beside the products it sends at least as much as the weights of the blocks, in bfloat16.
    sent = sum(x.collective.sent for x in weights if x.asynchronous)
    assert sent > 2 * 4 * (5 * 256 * 512 + 2 * 256 * 128)


def check_transfers(text, mesh, chip) -> list:
    """Checks the schedule, with the options of the chip (runtime/compiler.py); returns what the loop
    over blocks sends of weights and their gradients."""
    from monoformer_jax.planning.hardware import CHIPS
    from monoformer_jax.planning.schedule import predict
    from monoformer_jax.runtime.compiler import OPTIONS, compiler_options

    device = mesh.devices.flat[0]
    assert compiler_options("", device) == OPTIONS[device.device_kind]
    one = predict(text, mesh, CHIPS[chip], {"interval_attention": 1e-5})
    layer = [x for x in one.transfers if "/while/body/" in x.collective.where]
    weights = [x for x in layer if x.collective.axes == ("fsdp",)]
    # No gather of a weight is run as a sum with zeros, which would also show as fills.
    kinds = {x.collective.kind for x in weights if "transpose" not in x.collective.where}
    assert "all-reduce" not in kinds and {"all-gather", "collective-permute"} & kinds, kinds
    assert one.compute["fills"] < 0.01 * sum(one.compute.values())
    assert {"forward", "backward", "attention", "rope", "optimizer"} <= set(one.compute)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("check", ["kernels()", "schedule('v5e:4x4')", "schedule('v6e:4x4')"])
def test_the_train_step_compiles_for_a_tpu_slice_with_the_fused_kernels(check):
    done = subprocess.run(
        [sys.executable, "-c", f"import training_compile_test as t; t.check_{check}"],
        cwd=os.path.dirname(__file__),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
