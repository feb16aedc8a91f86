"""LoRA adapters: no effect at initialization, equal to merged matrices after training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from monoformer_jax.config import LoraConfig, MeshConfig
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.nn import lora
from monoformer_jax.parallel import make_mesh, put_batch
from monoformer_jax.pretrained.conversion import find_source, open_source, write_workdir
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.training.loop import train
from monoformer_jax.training.state import abstract_train_state, init_train_state, make_train_step

LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def made(config):
    """Parameters, a batch, and a function from adapters to hidden states."""
    params = monoformer.init(config.model, jax.random.key(0))
    batch = next(Batches(config, ByteTokenizer()).iterator)
    times = np.full((config.batch_size, config.max_images), 0.3, np.float32)

    @jax.jit
    def hidden(params, adapters):
        model = monoformer.bind(config.model, params)
        mask = monoformer.attention_mask(config.model, batch)
        layers = None if adapters is None else adapters["decoder"]["layers"]
        return model(batch, times, mask, adapters=layers)[0]

    return params, hidden


def test_fresh_adapters_change_nothing_and_trained_ones_are_merged_exactly(config, made):
    params, hidden = made
    c = config.model
    adapted = monoformer.adapters(c)
    adapters = lora.init(adapted, params, monoformer.logical_axes(c), LORA.rank, jax.random.key(1))
    plain = hidden(params, None)
    np.testing.assert_array_equal(hidden(params, lora.scaled(adapters, LORA)), plain)
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    adapters = jax.tree.unflatten(structure, drawn)
    changed = hidden(params, lora.scaled(adapters, LORA))
    assert np.abs(changed - plain).max() > 0.1
    merged = lora.merge(params, adapters, LORA)
    np.testing.assert_allclose(hidden(merged, None), changed, atol=2e-5)
    # Every layer of every adapter affects the output.
    grads = jax.grad(lambda a: jnp.sum(hidden(params, lora.scaled(a, LORA)) ** 2))(adapters)
    for leaf in jax.tree.leaves(grads):
        assert (np.abs(leaf).max((1, 2)) > 0).all()


def test_axes_name_every_dimension(config):
    c = config.model
    adapted, axes = monoformer.adapters(c), monoformer.logical_axes(c)
    shapes = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    adapters = lora.init(adapted, shapes, axes, 2, jax.random.key(0))
    named = jax.tree.map(
        lambda leaf, names: leaf.ndim == len(names), adapters, lora.logical_axes(adapted)
    )
    assert all(jax.tree.leaves(named))


def test_lora_needs_a_model_to_adapt(change):
    with pytest.raises(InputError, match=r"lora\.rank=4 adapts a trained model: set init_from"):
        change(lora={"rank": 4})


@pytest.mark.slow
def test_a_step_trains_only_adapters_and_image_modules(config, made):
    """Also on a mesh that shards the adapters over fsdp and tensor."""
    params, _ = made
    lora_config = dataclasses.replace(config, lora=LORA, init_from="somewhere")
    batch = next(Batches(config, ByteTokenizer()).iterator)
    seen = []
    for sizes in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.tensor])
        target = abstract_train_state(lora_config, mesh)
        frozen = jax.tree.map(
            lambda leaf, value: jax.device_put(value, leaf.sharding),
            target.frozen, {name: params[name] for name in target.frozen},
        )  # fmt: skip
        state = init_train_state(lora_config, mesh).replace(frozen=frozen)
        before = jax.device_get(state)
        step = make_train_step(lora_config, mesh)
        for _ in range(3):
            state, metrics = step(state, put_batch(batch, mesh))
        seen.append(float(metrics.compute()["loss"]))
        jax.tree.map(np.testing.assert_array_equal, before.frozen, jax.device_get(state.frozen))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
        assert moved["image_head"]["out"]["kernel"] and all(jax.tree.leaves(moved["lora"]))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.slow
def test_a_run_saves_only_trainable_parameters_resumes_and_is_merged(config, tmp_path):
    """Trains a base, adapts it in two starts, merges the result and continues training from it."""
    base = dataclasses.replace(config, steps=2, checkpoint_every=2)
    train(base, tmp_path / "base")
    adapting = dataclasses.replace(base, lora=LORA, init_from=str(tmp_path / "base"))
    for steps in (1, 2):
        train(dataclasses.replace(adapting, steps=steps, checkpoint_every=1), tmp_path / "adapters")
    train(dataclasses.replace(adapting, checkpoint_every=2), tmp_path / "at_once")
    whole, params, meta = load_trained(tmp_path / "adapters")
    assert meta["step"] == 2 and not whole.lora.rank
    jax.tree.map(np.testing.assert_array_equal, params, load_trained(tmp_path / "at_once")[1])

    before = load_trained(tmp_path / "base")[1]
    np.testing.assert_array_equal(params["text_head"], before["text_head"])
    assert (
        params["decoder"]["layers"]["mlp"]["up"] != before["decoder"]["layers"]["mlp"]["up"]
    ).any()
    with Checkpoints(tmp_path / "adapters") as checkpoints:
        folder = checkpoints.folder / "2" / "params"
    saved = ocp.StandardCheckpointer().metadata(folder).item_metadata
    assert "lora" in saved and not {"decoder", "token_embedding", "text_head"} & saved.keys()

    weights = open_source(find_source(str(tmp_path / "adapters")))
    write_workdir(tmp_path / "merged", weights)
    again, merged, _ = load_trained(tmp_path / "merged")
    assert again == whole
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    with pytest.raises(InputError, match="holds adapters; merge them first"):
        train(dataclasses.replace(adapting, init_from=str(tmp_path / "adapters")), tmp_path / "x")
