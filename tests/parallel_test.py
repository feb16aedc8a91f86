"""Layout: any mesh trains as one device does, nothing is born whole, slices cut the data axis."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError
from monoformer_jax.parallel import make_mesh

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def run_on_eight_devices() -> None:
    """What the subprocess runs: losses and gradients by mesh, bytes of one device's fresh state."""
    import dataclasses

    from monoformer_jax.cli import load_config
    from monoformer_jax.data.pipeline import Batches
    from monoformer_jax.data.tokenizer import ByteTokenizer
    from monoformer_jax.parallel import put_batch, use_mesh
    from monoformer_jax.training.losses import draw_noise, loss_fn, loss_normalizers
    from monoformer_jax.training.state import (
        abstract_train_state,
        init_train_state,
        make_init,
        make_train_step,
    )

    config = load_config(str(ROOT / "configs" / "digits.py:tiny"), [])
    model = dataclasses.replace(config.model, num_kv_heads=4)
    config = dataclasses.replace(config, model=model, batch_size=8)
    batches = Batches(config, ByteTokenizer())
    batches = [next(batches.iterator) for _ in range(20)]
    found = {"losses": {}}
    fresh = jax.device_get(init_train_state(config, make_mesh(MeshConfig(), jax.devices()[:1])))
    for axes in [(1, 1, 1), *MESHES]:
        mesh = make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(config, mesh))
        state, step, losses = jax.device_put(fresh, where), make_train_step(config, mesh), []
        for batch in batches:
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append(float(metrics.compute()["loss"]))
        found["losses"][str(axes)] = losses
    # One row per shard: XLA then once chose a layout in which gradients were wrong and losses right.
    few = {name: field[:4] for name, field in batches[0].items()}

    def loss(params, rows):
        noise = draw_noise(*jax.random.split(jax.random.key(0)), rows, config)
        return loss_fn(params, rows, noise, loss_normalizers(rows, noise), config)[0]

    gradients = []
    for axes in [(1, 1, 1), (2, 2, 2)]:
        few_mesh = make_mesh(MeshConfig(*axes), jax.devices()[: np.prod(axes)])
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(config, few_mesh))
        with use_mesh(few_mesh):
            params = jax.device_put(fresh.params, where.params)
            gradients.append(
                jax.device_get(jax.jit(jax.grad(loss))(params, put_batch(few, few_mesh)))
            )
    found["gradients"] = {
        jax.tree_util.keystr(path): float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-9))
        for (path, want), got in zip(
            jax.tree_util.tree_leaves_with_path(gradients[0]), jax.tree.leaves(gradients[1])
        )
    }
    memory = make_init(config, mesh).lower().compile().memory_analysis()
    found["init"] = [memory.output_size_in_bytes, memory.temp_size_in_bytes]
    found["state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def eight():
    code = "import parallel_test; parallel_test.run_on_eight_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_any_mesh_of_eight_devices_trains_as_one_device_does(eight):
    losses = {axes: np.array(values) for axes, values in eight["losses"].items()}
    one = losses.pop("(1, 1, 1)")
    assert len(losses) == len(MESHES) and one[-1] < one[0]
    for axes, got in losses.items():
        np.testing.assert_allclose(got[0], one[0], rtol=1e-6, err_msg=axes)
        np.testing.assert_allclose(got, one, rtol=1e-4, err_msg=axes)


@pytest.mark.slow
def test_gradients_of_one_row_per_shard_are_those_of_one_device(eight):
    assert eight["gradients"]
    assert {name: apart for name, apart in eight["gradients"].items() if apart > 1e-4} == {}


@pytest.mark.slow
def test_no_parameter_is_born_whole(eight):
    """On fsdp 2, tensor 4 a device makes its part of the fresh state and holds little beside it."""
    made, temporaries = eight["init"]
    assert made < eight["state"] / 8 * 1.25  # norm scales and biases are on every device
    assert temporaries < made


def test_slices_are_whole_runs_of_the_data_axis():
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    from monoformer_jax.planning.hardware import all_chips

    devices = all_chips("v5e:2x2", 2)
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2, slices=2), devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match=r"mesh\.slices=1, but the devices are in 2"):
        make_mesh(MeshConfig(), devices)
    with pytest.raises(InputError, match=r"mesh\.data=1 is not a multiple of mesh\.slices=2"):
        make_mesh(MeshConfig(data=1, fsdp=8, slices=2), devices)
    with pytest.raises(InputError, match=r"mesh\.slices=2, but the devices are in 1"):
        make_mesh(MeshConfig(slices=2))
