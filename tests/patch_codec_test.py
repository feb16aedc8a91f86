"""The U-Net patch codec: packing, shapes, cached denoising, gradients, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import drawn_params, run

from monoformer_jax import batch as contract
from monoformer_jax import convert
from monoformer_jax.batch import PATCH
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.packing import Pack
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import base_config, make_config, monoformer, named_size
from monoformer_jax.pretrained.conversion import Source, Weights, write_workdir
from monoformer_jax.pretrained.table import Tensor, by_path
from monoformer_jax.runtime.weights import check_init_from, load_trained

TOKENIZER = ByteTokenizer()
IMAGES = 6


def model(patch_size=2, **changes):
    return monoformer.MonoFormerConfig(**named_size("tiny") | {
        "patch_codec": "unet", "patch_size": patch_size, "max_patches": 16, "codec_dim": 8,
        "codec_blocks": 2 if patch_size == 4 else 1, "channels": 2,
    } | changes)  # fmt: skip


def shown(seed, height, width, denoise=True):
    pixels = np.random.default_rng(seed).normal(size=(height, width, 2))
    return Image(pixels.astype(np.float32), denoise)


@functools.cache
def made(patch_size):
    """Config and random parameters."""
    c = model(patch_size, predict_variance=patch_size == 4)
    return c, drawn_params(c)


@functools.partial(jax.jit, static_argnums=0)
def forward(c, params, batch, x_t, times):
    return monoformer.forward(c, params, batch, x_t, times)


def sizes(p):
    """Heights and widths: the largest, two that are not square, one patch."""
    return ((4 * p, 4 * p), (2 * p, 4 * p), (3 * p, p), (p, p))


def pack(c, rows, length=96):
    packed = Pack(
        [], c.layout, rows=len(rows), length=length, buffer=1, pad_id=0, max_images=IMAGES
    )
    return packed.assemble(rows)


def noised(batch, seed=0):
    """x_t, with noise that belongs to the image's size, and the noise levels."""
    x_t, times = np.array(batch["patches"]), np.zeros((len(batch["tokens"]), IMAGES), np.float32)
    for b in range(len(x_t)):
        for number in range(1, batch["image_ids"][b].max() + 1):
            here = (batch["image_ids"][b] == number) & (batch["token_types"][b] == PATCH)
            if batch["denoise"][b][here].any():
                n = int(here.sum())
                times[b, number - 1] = t = 0.2 + n / 32
                noise = np.random.default_rng(n + seed).normal(size=(n, x_t.shape[-1]))
                x_t[b, here] = (1 - t) * x_t[b, here] + t * noise
    return jnp.asarray(x_t), jnp.asarray(times)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_packed_images_of_any_shape_are_computed_as_alone(patch_size):
    c, params = made(patch_size)
    documents = [
        build_document([f"n{i}", shown(i, *size)], TOKENIZER, c.layout)
        for i, size in enumerate(sizes(patch_size))
    ]
    batch = pack(c, [documents, *([one] for one in documents[1:])])
    x_t, times = noised(batch)
    out = forward(c, params, batch, x_t, times)
    patches = (batch["token_types"] == PATCH) & (batch["image_ids"] > 0)
    for number in (2, 3, 4):
        packed = patches[0] & (batch["image_ids"][0] == number)
        outputs = [out.prediction, out.text_hidden, *([out.variance] if c.predict_variance else [])]
        for values in outputs:
            got, want = values[0][packed], values[number - 1][patches[number - 1]]
            assert got.shape == want.shape and np.abs(want).max() > 1e-2
            np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_vector_of_a_patch_depends_on_its_neighbours():
    """The codec sees the image, not patches alone; and no other image."""
    c, params = made(2)
    batch = pack(c, [[build_document([shown(0, 8, 8), shown(1, 4, 8)], TOKENIZER, c.layout)]])
    x_t, times = noised(batch)
    first = (batch["token_types"][0] == PATCH) & (batch["image_ids"][0] == 1)
    other = x_t.at[0, np.flatnonzero(first)[0]].add(1.0)

    @jax.jit
    def embed(x):
        return monoformer.bind(c, params).embed(dict(batch, patches=x), times)[0]

    moved = np.abs(embed(x_t) - embed(other)).max(-1) > 1e-6
    assert 1 < moved.sum() <= first.sum() and not moved[~first].any()


@pytest.mark.parametrize("size", [(4, 8), pytest.param((8, 8), marks=pytest.mark.slow)])
def test_cached_denoising_equals_the_whole_forward(size):
    """Behind a prompt with clean images, more of them than a row has slots for."""
    c, params = made(2)
    context = [shown(i, 2, 4, denoise=False) for i in range(7)]
    parts = ["draw", *context, "this"]
    prompt = build_document(parts, TOKENIZER, c.layout, closing=[TOKENIZER.im_start_id])
    whole = build_document([*parts, shown(9, *size)], TOKENIZER, c.layout, closing=[])
    # A forward pass has a slot for each of its images.
    length, images = 128, 8
    batch = contract.stack([whole], length, 0)
    here = np.flatnonzero(batch["image_ids"][0] == 8)[c.layout.time_tokens :]
    x_t = np.random.default_rng(5).normal(size=(1, len(here), c.layout.patch_dim))
    noisy = np.array(batch["patches"])
    noisy[0, here] = x_t[0]
    times = np.zeros((1, images), np.float32)
    times[0, 7] = 0.7
    out = forward(c, params, batch, jnp.asarray(noisy), jnp.asarray(times))

    @jax.jit
    def cached(block):
        state = monoformer.extend(c, params, monoformer.init_state(c, 1), block, 64)
        grid = (size[0] // 2, size[1] // 2)
        state = state.with_room(c.layout.time_tokens + len(here))
        found = monoformer.denoise(c, params, state, grid, jnp.asarray(x_t, jnp.float32),
                                   jnp.full(1, 0.7))  # fmt: skip
        return state.hidden, found[0]

    hidden, prediction = cached(contract.stack([prompt], 128, 0))
    last = len(prompt["tokens"]) - 1
    np.testing.assert_allclose(hidden[0], out.text_hidden[0, last], atol=1e-5)
    np.testing.assert_allclose(prediction[0], out.prediction[0, here], atol=1e-5)


def test_every_parameter_has_a_gradient_and_skips_go_from_input_to_output():
    c, params = made(2)
    documents = [build_document(["a", shown(1, 8, 4), "b"], TOKENIZER, c.layout)]
    batch = pack(c, [documents])
    x_t, times = noised(batch)

    def loss(params, x_t):
        out = monoformer.forward(c, params, batch, x_t, times)
        image = batch["denoise"] & (batch["token_types"] == PATCH)
        logits = (out.text_hidden @ params["text_head"])[..., 0].sum()
        return (jnp.cos(out.prediction).sum(-1) * image).sum() + logits

    grads = jax.jit(jax.grad(loss))(params, x_t)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert jnp.abs(leaf).max() > 1e-7, path
    # Cut off the decoder: the prediction still depends on the input, through the skips.
    cut = params | {"image_head": params["image_head"] | {
        "input": jax.tree.map(jnp.zeros_like, params["image_head"]["input"])}}  # fmt: skip
    one, two = (forward(c, cut, batch, x, times).prediction for x in (x_t, 2 * x_t))
    assert np.abs(one - two)[batch["denoise"] & (batch["token_types"] == PATCH)].max() > 1e-3


def test_flops_are_those_of_the_products():
    """Against XLA's count of the codec alone, which also counts additions and norms."""
    patch_size = 8
    c = model(patch_size, codec_dim=64, embed_dim=256, codec_blocks=2)
    params = jax.eval_shape(lambda: monoformer.init(c, jax.random.key(0)))
    codec = {name: params[name] for name in ("patch_embedding", "image_head")}

    def run(codec, x, embedding, masks):
        net = monoformer.bind(c, {**params, **codec})
        vectors, skips = net.patch_embedding(x, embedding, masks)
        return net.image_head(vectors, embedding, skips, masks)

    side = 16 * patch_size  # XLA does not count products with the border, which are fewer there
    shapes = [(1, side, side, 2), (1, c.embed_dim)]
    x, embedding = (jax.ShapeDtypeStruct(s, "float32") for s in shapes)
    masks = [jax.ShapeDtypeStruct((1, 16 * 2**n, 16 * 2**n, 1), "float32")
             for n in range(patch_size.bit_length() - 1, -1, -1)]  # fmt: skip
    counted = jax.jit(run).lower(codec, x, embedding, masks).cost_analysis()["flops"]
    ours = monoformer.flops(c, patches=256)
    assert 0.97 < ours / counted < 1.08, (ours, counted)


def config(**changes):
    values = base_config().to_dict()
    values["model"] |= named_size("tiny") | {"patch_codec": "unet", "max_patches": 16} | changes
    return make_config(values)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 1}, "takes model.patch_size 2, 4 or 8, not 1"),
        ({"patch_size": 3}, "takes model.patch_size 2, 4 or 8, not 3"),
        ({"max_patches": 0}, "needs model.max_patches, .* a square number; it is 0"),
        ({"max_patches": 15}, "needs model.max_patches, .* it is 15"),
        ({"max_patches": 4}, "model.max_patches=4, but data.image_size=8 is 16 patches"),
        ({"codec_dim": 0}, "model.codec_dim=0 must be above 0"),
        ({"patch_codec": "vit"}, "model.patch_codec='vit' is none of linear, unet"),
        ({"patch_codec": "linear"}, "model.max_patches=16 is for model.patch_codec='unet'"),
        ({"original": {"image_head": "add"}}, "takes no variant of model.original"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_sides_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(InputError, match="an image of 8×6 cannot be split into patches of size 4"):
        build_document([shown(0, 8, 6)], TOKENIZER, made(4)[0].layout)
    values = base_config().to_dict()
    values["model"] |= named_size("tiny") | {"patch_codec": "unet", "patch_size": 8}
    values["data"] |= {"image_size": 12}
    with pytest.raises(InputError, match=r"data.image_size=12 is not divisible by .*patch_size=8"):
        make_config(values | {"model": values["model"] | {"max_patches": 1}})


def test_weights_of_another_codec_are_refused_and_conversion_keeps_all(tmp_path):
    """A workdir of a U-Net, to safetensors and back, and as the start of other runs."""
    c, params = made(2)
    values = base_config().to_dict()
    values["model"] = {k: v for k, v in dataclasses.asdict(c).items() if k in values["model"]}
    whole, paths = make_config(values), by_path(params)
    tree = jax.tree.map(
        lambda x: Tensor(x.shape, np.dtype(np.float32), lambda: np.array(x)), params
    )
    source = Source(tmp_path / "unet", ours=True)
    write_workdir(tmp_path / "unet", Weights(whole, None, tree, tuple(paths), source))
    run(convert, f"--from={tmp_path}/unet", f"--to={tmp_path}/export", "--check")
    run(convert, f"--from={tmp_path}/export", f"--to={tmp_path}/back", "--check")
    config, loaded, _ = load_trained(tmp_path / "back")
    assert config.model == whole.model
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(params))
    assert check_init_from(tmp_path / "back", c) == []
    linear = dataclasses.replace(c, patch_codec="linear", max_patches=0)
    was = r"patch_codec \(was 'unet', now 'linear'\), max_patches \(was 16, now 0\)"
    with pytest.raises(InputError, match=was):
        check_init_from(tmp_path / "back", linear)
