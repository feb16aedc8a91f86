"""Sampling on a mesh: equal results on any number of devices, and the program that `plan` compiles."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import random_params

from monoformer_jax.config import MeshConfig, SamplingConfig
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import make_config, named_size
from monoformer_jax.parallel import batch_shards, make_mesh, use_mesh
from monoformer_jax.planning import estimate
from monoformer_jax.sampling import image
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import IMAGES, Sampler, abstract_weights, sampling_mesh
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingParams, generate_text

TOKENIZER = ByteTokenizer()
MESHES = [MeshConfig(data=2), MeshConfig(data=2, tensor=2), MeshConfig(data=1, tensor=2)]


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


def on_mesh(config, params, c):
    """A sampler with parameters sharded by `parallel.RULES`."""
    size = c.data * c.fsdp * c.tensor
    mesh = make_mesh(c, jax.devices()[:size])
    target = abstract_weights(config.model, "float32", mesh)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, target)
    return Sampler(config, placed, TOKENIZER, mesh)


def results(sampler):
    """Images of three prompts, completions of three, and two turns of a session of three sequences."""
    sampling = SamplingConfig("heun", steps=2)
    images = generate_images(sampler, [["one"], ["two"], ["three"]], sampling=sampling, seed=3)
    text = SamplingParams(temperature=[0.0, 0.7, 1.0])
    completions = generate_text(sampler, [["a"], ["bc"], ["d"]], max_tokens=6, sampling=text)
    session = Session(sampler, 3, seed=4, sampling=sampling, text=text)
    session.append([["draw"], ["it"], None])
    session.begin_image([1])
    images = [*images, *session.generate_images([1])]
    replies = session.generate(max_tokens=4)
    images += [part for reply in replies for part in reply if not isinstance(part, str)]
    said = [[part for part in reply if isinstance(part, str)] for reply in replies]
    tokens = [session.document(row)["tokens"].tolist() for row in (0, 1)]
    return images, [c.tokens for c in completions], said, tokens


@pytest.mark.slow
def test_results_do_not_depend_on_the_mesh(config, params):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_seq_len=64))
    want, *texts = results(Sampler(config, params, TOKENIZER))
    assert len(want) >= 4
    for c in MESHES:
        got, *others = results(on_mesh(config, params, c))
        assert others == texts, c
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(c))


@pytest.mark.slow
def test_plan_compiles_the_program_that_sample_runs(config, params, monkeypatch):
    """The lowered text is the same: arguments, shardings and operations."""
    sampler = on_mesh(config, params, MeshConfig(data=2, tensor=2))
    run, lowered = image.denoise, []

    def record(*arguments):
        lowered.append(run.lower(*arguments).as_text())
        return run(*arguments)

    monkeypatch.setattr(image, "denoise", record)
    count = IMAGES * batch_shards(sampler.mesh)
    generate_images(sampler, [["draw a one"]] * count)
    monkeypatch.undo()
    program, arguments = estimate._sample_program(config, sampler.mesh, "float32")
    with use_mesh(sampler.mesh):
        planned = program.lower(*arguments).as_text()
    assert lowered == [planned]


def test_the_default_mesh_has_the_smallest_tensor_axis_that_fits():
    devices = jax.devices()[:4]
    config = make_config(
        {"model": named_size("7b"), "data": {"image_size": 32, "max_seq_len": 512}}
    )
    gib = 2**30
    shape = dict(sampling_mesh(config, devices, "bfloat16", 31 * gib).shape)
    assert shape == {"data": 4, "fsdp": 1, "tensor": 1}
    assert sampling_mesh(config, devices, "float32", 31 * gib).shape["tensor"] == 2
    assert sampling_mesh(config, devices, "bfloat16", 15.75 * gib).shape["tensor"] == 2
    with pytest.raises(InputError, match=r"GiB on each of 4 devices, which have 2\.0"):
        sampling_mesh(config, devices, "bfloat16", 2 * gib)
    # A CPU does not report its memory, and two key/value heads are not divisible by four devices.
    tiny = make_config({"model": named_size("tiny")})
    assert dict(sampling_mesh(tiny, devices, "float32").shape)["data"] == 4
    with pytest.raises(InputError, match="use more devices"):
        sampling_mesh(tiny, devices, "float32", 1000)
