"""What is float32: in the HLO compiled for TPUs, which a CPU cannot show; and what bfloat16 costs."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from monoformer_jax.config import Config, DataConfig, LoraConfig, MeshConfig, ObjectiveConfig
from monoformer_jax.config import SamplingConfig as Sampling
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.models import monoformer
from monoformer_jax.models.monoformer import MonoFormerConfig
from monoformer_jax.nn import autoencoder, clip, lora
from monoformer_jax.nn.layers import head_matmul
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training.losses import draw_noise, loss_fn, loss_normalizers

# 2 P = 32 outputs of the image head, and no other dimension of 32.
MODEL = MonoFormerConfig(num_layers=1, embed_dim=128, num_heads=2, num_kv_heads=2, head_dim=64,
                         mlp_dim=256, channels=4, attention="dense")  # fmt: skip


def products(text):
    """(result type and shape, whole line) of the matrix products and convolutions of an HLO."""
    return re.findall(r"= (\w+\[[\d,]*\])[^\n=]*? (?:convolution|dot)\(([^\n]*)", text)


def compiled(chip):
    """HLO of each program, optimised as `plan` and a run have it."""
    from monoformer_jax.parallel import make_mesh
    from monoformer_jax.planning.estimate import (
        _sample_program,
        _train_program,
        compile_scheduled,
        use_mesh,
    )
    from monoformer_jax.planning.hardware import abstract, all_chips

    slice_, one = (make_mesh(MeshConfig(*axes), all_chips(f"{chip}:2x2")[: np.prod(axes)])
                   for axes in ((1, 2, 2), (1, 1, 1)))  # fmt: skip
    config = Config(
        MODEL, batch_size=4, data=DataConfig(image_size=8, max_seq_len=64),
        objective=ObjectiveConfig(kind="ddpm", learn_sigma=True),
        sampling=Sampling(solver="ddpm", steps=20),
    )  # fmt: skip
    exact = dataclasses.replace(config, model=dataclasses.replace(MODEL, dtype="float32"))

    def hlo(program, arguments, mesh):
        with use_mesh(mesh):
            return compile_scheduled(program.lower(*arguments))[1]

    yield "bfloat16 step", hlo(*_train_program(config, slice_, "float32"), slice_)
    yield "sampler", hlo(*_sample_program(exact, one, "float32"), one)
    if chip != "v5e":  # the others only ask for it in other places
        return
    yield "step", hlo(*_train_program(exact, one, "float32"), one)

    # The rest in one program, since each compilation has a cost of its own.
    kl = autoencoder.AutoencoderConfig(widths=(32, 32), blocks=1)
    tower = clip.ClipConfig(32, 64, 2, 2, 8, 16)

    def rest(kl_params, tower_params, pixels, latents, kernel, a, b):
        model = autoencoder.bind(kl, kl_params)
        seen = clip.bind(tower, tower_params).features(pixels)
        merged = lora.merge(kernel, {"a": a, "b": b}, LoraConfig(rank=8))
        return model.encode(pixels), model.decode(latents), seen, merged

    parameters = [
        jax.tree.map(lambda x: abstract(one, x.shape, x.dtype), jax.eval_shape(init))
        for init in (lambda: autoencoder.init(kl, jax.random.key(0)),
                     lambda: clip.init(tower, jax.random.key(0)))
    ]  # fmt: skip
    shapes = [(2, 16, 16, 3), (2, 8, 8, 4), (2, 128, 64), (2, 128, 8), (2, 8, 64)]
    arrays = [abstract(one, shape, "f4") for shape in shapes]
    yield "autoencoder, tower, merge", hlo(jax.jit(rest), (*parameters, *arrays), one)


def check_chip(chip):
    """Run by the test in a subprocess."""
    found = {}
    for name, text in compiled(chip):
        every = products(text)
        found[name] = len(every)
        if name != "bfloat16 step":
            rounded = [
                line for _, line in every if "operand_precision={highest,highest}" not in line
            ]
            assert every and not rounded, (name, rounded[:3])
            continue
        # Logits, gradients of the hidden states and of the head.
        text_head = [kind for kind, line in every if "(text_loss)/shard_map/" in line]
        assert len(text_head) == 3 and all(kind.startswith("f32[") for kind in text_head), text_head
        # Output of the image head, gradients of its kernel and of its input.
        image_head = [kind for kind, line in every if re.search(r"\b32\b", kind)]
        assert len(image_head) >= 2, image_head
        assert all(kind.startswith("f32[") for kind in image_head), image_head
        assert any(kind.startswith("bf16[") for kind, _ in every)  # the blocks are bfloat16
        # The gradient of the text head is float32 while it is summed over devices.
        summed = re.findall(r"= (\w+)\[[^\n]* reduce-scatter\([^\n]*/shard_map/", text)
        assert summed == ["f32"], summed
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_products_that_must_be_float32_are_in_the_hlo_of_a_tpu(chip):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(
        [sys.executable, "-c", f"import precision_test as t; t.check_chip({chip!r})"],
        cwd=ROOT / "tests", env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(json.loads(done.stdout.splitlines()[-1]).values()) > 0


@pytest.fixture(scope="module")
def pair(config):
    """The config in float32 and in bfloat16, its parameters, a batch and its noise."""
    both = {
        dtype: dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    }
    batch = next(Batches(config, ByteTokenizer()).iterator)
    noise = draw_noise(*jax.random.split(jax.random.key(1)), batch, config)
    return both, monoformer.init(config.model, jax.random.key(0)), batch, noise


def test_loss_and_gradients_in_bfloat16_are_close_to_float32(pair):
    """Limits: losses to 0.2 %; every gradient to 4 % of its norm."""
    both, params, batch, noise = pair
    whole = loss_normalizers(batch, noise)
    found = {}
    for dtype, config in both.items():
        run = functools.partial(loss_fn, config=config)
        (_, parts), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(
            params, batch, noise, whole
        )
        found[dtype] = parts, grads
    (want, exact), (got, rounded) = found["float32"], found["bfloat16"]
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(got[name], want[name], rtol=2e-3)
    for path, g in jax.tree_util.tree_leaves_with_path(exact):
        other = functools.reduce(lambda tree, key: tree[key.key], path, rounded)
        assert other.dtype == jnp.float32
        apart = jnp.linalg.norm(other - g) / jnp.linalg.norm(g)
        assert apart < 0.04, (jax.tree_util.keystr(path), float(apart))


def test_twenty_steps_of_the_sampler_in_bfloat16_are_close_to_float32(pair):
    """Limit: 2 % of the standard deviation of the values, root mean square."""
    both, params, _, _ = pair
    sampling = Sampling("heun", steps=20, guidance=2.0)
    images = {
        dtype: generate_images(
            Sampler(config, params, ByteTokenizer()),
            [["draw a one"]] * 4,
            sampling=sampling,
            seed=3,
        )
        for dtype, config in both.items()
    }
    apart = images["bfloat16"] - images["float32"]
    assert 0 < np.sqrt(np.mean(apart**2)) < 0.02 * images["float32"].std()


def test_a_head_in_bfloat16_has_float32_outputs_and_gradients():
    """Sums of rounded operands are exact here, and are not rounded again."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-8, 8, (3, 40, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(-8, 8, (16, 5)), jnp.float32)
    out, vjp = jax.vjp(head_matmul, x, kernel)
    cotangent = jnp.asarray(rng.integers(-8, 8, out.shape), jnp.float32)
    d_x, d_kernel = vjp(cotangent)
    want = [np.asarray(y, np.float64) for y in (x, kernel, cotangent)]
    np.testing.assert_array_equal(out, want[0] @ want[1])
    np.testing.assert_array_equal(d_kernel, np.einsum("bld,blp->dp", want[0], want[2]))
    assert (out.dtype, d_kernel.dtype, d_x.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), want[2] @ want[1].T, rtol=2**-8)
    assert np.abs(np.asarray(d_kernel)).max() > 256  # bfloat16 would round it
