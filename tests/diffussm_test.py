"""DiffuSSM: the paper's equations, packed rows, sizes and FLOPs, and the commands of every model."""

import dataclasses
import json
import math
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from fixtures import losses, run
from ssm_test import both_directions

from monoformer_jax import convert, evaluate, plan, sample, train
from monoformer_jax.batch import TEXT
from monoformer_jax.cli import load_config
from monoformer_jax.config import MeshConfig
from monoformer_jax.data.documents import Image, build_document
from monoformer_jax.data.packing import Pack
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import MODELS, base_config, make_config, named_size
from monoformer_jax.nn import ssm
from monoformer_jax.parallel import make_mesh, put_batch, use_mesh
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import generate_text
from monoformer_jax.training.losses import draw_noise, loss_fn, loss_normalizers

MODEL = MODELS["diffussm"]
TINY = f"--config={ROOT / 'configs' / 'digits_diffussm.py:tiny'}"


def config_with(**model):
    c = base_config("diffussm")
    c.model.update(named_size("tiny", "diffussm"), num_layers=1, embed_dim=8, state_size=4, **model)
    c.data.mixture = {"draw": 1.0}
    c.data.update(max_seq_len=176, end_of_prompt=False)
    return c


def weights(config):
    """Random parameters with modulations other than 0."""
    leaves, tree = jax.tree.flatten(MODEL.init(config.model, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [
        x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)
    ])  # fmt: skip


def equations(c, params, x, text, t, grid):
    """The module docstring, position by position in float64: x [n, P] -> [n, outputs]."""
    D, M, n = c.embed_dim, c.hourglass_ratio, len(x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def s(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def dense(x, name, tree):
        return x @ tree[name]["kernel"] + tree[name]["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    features = np.concatenate([np.cos(1000 * t * frequencies), np.sin(1000 * t * frequencies)])
    time = dense(silu(dense(features, "hidden", p["time_embedding"])), "out", p["time_embedding"])
    condition = silu(time + text)
    stream = np.stack([dense(x[j * M : j * M + M].ravel(), "input", p) for j in range(n // M)])
    for j in range(n // M):
        row, column = divmod(j * M, grid)
        f = 10_000.0 ** (-np.arange(D // 4) / (D // 4))
        stream[j] += np.concatenate([g(v * f) for v in (column, row) for g in (np.sin, np.cos)])
    layer = jax.tree.map(lambda leaf: leaf[0], p["layers"])
    shift, scale = np.split(dense(condition, "modulation", layer), 2)
    h = norm(stream) * (1 + scale) + shift
    up_bias = layer["up_bias"].reshape(M, D)
    u = np.stack([
        s(s(dense(h[l // M], "inner", layer)) @ layer["up"][:, l % M] + up_bias[l % M])
        for l in range(n)
    ])  # fmt: skip
    with jax.enable_x64(True):
        y = np.asarray(both_directions(layer["ssm"], u)).reshape(n, 2 * D)
    wide = np.zeros((n // M, 2 * D))
    part = 2 * D // M
    for l in range(n):
        j, k = divmod(l, M)
        wide[j, part * k : part * (k + 1)] = y[l] @ layer["down"][k].reshape(2 * D, part)
    wide = s(wide + layer["down_bias"])
    o = dense(s(dense(wide, "value", layer)) * s(dense(h, "gate", layer)), "out", layer)
    shift, scale = np.split(dense(condition, "modulation", p["head"]), 2)
    return dense(norm(stream + o) * (1 + scale) + shift, "out", p["head"]).reshape(n, -1)


def packed(config):
    """A row of two documents with an image each, the second one smaller, and its noised values."""
    random = np.random.default_rng(0)
    documents = [
        build_document(
            [prompt, Image(random.normal(size=size).astype(np.float32), denoise=True)],
            ByteTokenizer(), config.layout,
        )
        for prompt, size in (("ab", (8, 8, 1)), ("cde", (4, 6, 1)))
    ]  # fmt: skip
    documents = grain.MapDataset.source(documents).to_iter_dataset()
    (batch,) = Pack(documents, config.layout, rows=1, length=176, buffer=2, pad_id=0, max_images=2)
    return batch, random.normal(size=batch["patches"].shape).astype(np.float32)


@pytest.mark.parametrize("form, ratio", [("fft", 2), ("chunked", 4)])
def test_packed_rows_denoising_and_the_equations_agree(form, ratio):
    """Training on a row of two documents, sampling each of them, and the docstring in float64."""
    values = config_with(ssm=form, chunk=16, hourglass_ratio=ratio)
    values.objective.update(kind="ddpm", learn_sigma=True)
    values.sampling.solver = "ddpm"
    config = make_config(values)
    c, params = config.model, weights(config)
    batch, x_t = packed(config)
    times = np.array([[0.3, 0.8]], np.float32)
    out = jax.jit(lambda p: MODEL.forward(c, p, batch, x_t, times))(params)
    assert out.text_hidden is None and MODEL.text_head(c, params) is None
    found = np.concatenate([out.prediction, out.variance], -1)[0]

    for image, grid in ((1, (8, 8)), (2, (4, 6))):
        here = np.flatnonzero(batch["image_ids"][0] == image)
        before = batch["segment_ids"][0] == batch["segment_ids"][0, here[0]]
        before = np.flatnonzero(before & (np.arange(176) < here[0]))
        assert (batch["token_types"][0, before] == TEXT).all()
        prompt = {name: field[:, before] for name, field in batch.items()}
        half = {name: field[:, before[:2]] for name, field in batch.items()}
        rest = {name: field[:, before[2:]] for name, field in batch.items()}
        state = MODEL.extend(c, params, MODEL.init_state(c, 1), prompt, 64)
        steps = MODEL.extend(c, params, MODEL.init_state(c, 1), half, 64)
        steps = MODEL.extend(c, params, steps, rest, 64)
        np.testing.assert_allclose(state.hidden, steps.hidden, atol=1e-5)
        assert state.lengths == state.texts == len(before)
        alone = MODEL.denoise(c, params, state, grid, x_t[:, here], times[:, image - 1])
        np.testing.assert_allclose(found[here], np.concatenate(alone, -1)[0], atol=2e-5)

        table = np.asarray(params["token_embedding"], np.float64)
        text = table[batch["tokens"][0, before]].mean(0)
        t = float(times[0, image - 1])
        want = equations(c, params, np.float64(x_t[0, here]), text, t, grid[1])
        np.testing.assert_allclose(found[here], want, atol=5e-5)


def test_size_and_flops_of_the_paper():
    c = MODEL.Config(**named_size("xl", "diffussm"))
    shapes = jax.eval_shape(lambda: MODEL.init(c, jax.random.key(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert 668.8e6 <= count <= 673e6
    jax.tree.map(lambda axes, x: None if len(axes) == x.ndim else pytest.fail(str(axes)),
                 MODEL.logical_axes(c), shapes, is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip

    def macs(length, form):
        convolution = ssm.flops(form, length, c.embed_dim, c.state_size, c.chunk) * c.num_layers
        return MODEL.flops(c, tokens=length, patches=length) / 2, convolution / 2

    dense, _ = macs(1024, "fft")
    assert 280e9 <= dense <= 296e9
    for form in ("fft", "chunked"):
        assert sum(macs(4096, form)) / sum(macs(1024, form)) <= 4.4

    # XLA's count of a block at full width, without its convolution.
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])
    one = dataclasses.replace(c, num_layers=1, dtype="float32")

    def block(layer, x, conditioning, real):
        model = MODEL.bind(one, shapes | {"layers": jax.tree.map(lambda a: a[None], layer)})
        run = jax.tree.map(lambda a: a[0], model.layers)
        run.ssm = lambda u, form, chunk: jnp.stack([u, u], 2)
        return run(x, conditioning, real)

    arguments = [jax.ShapeDtypeStruct(s, "float32") for s in ((1, 512, 1152), (1, 1152), (1, 1024))]
    counted = jax.jit(block).lower(params, *arguments).cost_analysis()["flops"]
    want = MODEL.flops(one, tokens=1024)
    assert want <= counted <= 1.03 * want


def test_flops_of_the_peers_in_docs_backbones():
    """DiT-XL/2 by its formula, as the page prints it, against XLA's count of one block."""

    def dit(patches, layers=28, D=1152):
        return 2 * layers * (12 * patches * D**2 + 2 * patches**2 * D + 6 * D**2)

    assert abs(dit(256) / 2 - 118.6e9) < 0.1e9  # published

    def block(x, c, w):
        shift, scale, gate = jnp.split(c @ w["modulation"], 6)[:3]
        q, k, v = ((x * scale + shift) @ w[name] for name in "qkv")
        heads = [y.reshape(len(y), 2, -1) for y in (q, k, v)]
        scores = jnp.einsum("lnh,snh->nls", *heads[:2])
        x = x + gate * (jnp.einsum("nls,snh->lnh", scores, heads[2]).reshape(x.shape) @ w["o"])
        return x @ w["up"] @ w["down"]

    D, n = 64, 96
    w = {name: jax.ShapeDtypeStruct((D, D * m), "float32")
         for name, m in {"q": 1, "k": 1, "v": 1, "o": 1, "up": 4, "modulation": 6}.items()}  # fmt: skip
    w["down"] = jax.ShapeDtypeStruct((4 * D, D), "float32")
    arguments = [jax.ShapeDtypeStruct(s, "float32") for s in ((n, D), (D,))]
    counted = jax.jit(block).lower(*arguments, w).cost_analysis()["flops"]
    assert dit(n, 1, D) <= counted <= 1.06 * dit(n, 1, D)
    page = (ROOT / "docs" / "backbones.md").read_text()
    for length in (256, 1024, 4096):
        assert f"{dit(length // 4) / 2e9:,.0f}" in page


def test_a_mesh_gives_the_same_loss_and_gradients():
    values = config_with(ssm="chunked", chunk=16)
    values.batch_size = 4
    config = make_config(values)
    batch = next(Batches(config, ByteTokenizer()).iterator)
    params = weights(config)

    def run(mesh):
        rows = put_batch(batch, mesh)

        def loss(params):
            noise = draw_noise(*jax.random.split(jax.random.key(0)), rows, config)
            return loss_fn(params, rows, noise, loss_normalizers(rows, noise), config)[0]

        with use_mesh(mesh):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    want = run(make_mesh(MeshConfig(), jax.devices()[:1]))
    found = run(make_mesh(MeshConfig(1, 2, 2)))
    assert found[0] == pytest.approx(want[0], rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(x[1]) for x in (found, want))):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    """Trained, stopped and resumed with the losses of one run, sampled, evaluated, converted."""
    runs = [tmp_path / name for name in ("once", "twice")]
    small = [TINY, "--processes=1", "--config.checkpoint_every=2", "--config.optimizer.warmup_steps=0",
             "--config.optimizer.schedule=constant", "--config.sampling.steps=1"]  # fmt: skip
    assert run(train, *small, f"--workdir={runs[0]}", "--config.steps=4") == 0
    assert run(train, *small, f"--workdir={runs[1]}", "--config.steps=2") == 0
    assert run(train, *small, f"--workdir={runs[1]}", "--config.steps=4") == 0
    found = losses(runs[0])
    assert found == losses(runs[1]) and found.keys() == {1, 2, 3, 4} and found[4] < found[1]

    out = tmp_path / "seven.png"
    paint = ["--prompt=draw a seven", "--paint", "--processes=1", f"--out={out}"]
    assert run(sample, f"--workdir={runs[0]}", *paint) == 0 and out.is_file()
    with pytest.raises(InputError, match=r"model\.kind='diffussm' generates images only.*--paint"):
        run(sample, f"--workdir={runs[0]}", "--prompt=two plus three is", "--processes=1")

    capsys.readouterr()
    run(evaluate, f"--workdir={runs[0]}", f"--json={tmp_path / 'scores.json'}")
    said, scores = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert said.count("not measured, no text head") == 3
    assert {"draw_accuracy", "frechet", "frechet_real", "steps", "train_seconds"} <= scores.keys()
    assert not {"read_accuracy", "say_accuracy", "opens_image"} & scores.keys()

    there, back = tmp_path / "exported", tmp_path / "back"
    run(convert, f"--from={runs[0]}", f"--to={there}", "--check")
    run(convert, f"--from={there}", f"--to={back}", "--check")
    for a, b in zip(*(jax.tree.leaves(load_trained(path)[1]) for path in (runs[0], back))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_it_plans_training_and_sampling(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    for mode in ("train", "sample"):
        file = tmp_path / f"{mode}.json"
        assert run(plan, TINY, "--topology=v5e:2x2", f"--mode={mode}", f"--json={file}",
                   "--config.model.max_patches=64", "--config.model.chunk=16",
                   "--mesh=fsdp=2,tensor=2") == 0  # fmt: skip
        assert json.loads(file.read_text())["flops_per_step"] > 0


def test_guided_images_and_text_that_is_asked_for():
    config = make_config(config_with())
    sampler = Sampler(config, weights(config), ByteTokenizer())
    session = Session(sampler, 2, seed=3)
    session.append([["a"], ["bc"]])
    session.begin_image([0, 1])
    images = session.generate_images([0, 1])
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()
    session.append([["d"], None])  # the next turn, after the image
    session.begin_image([0])
    assert session.generate_images([0]).shape == (1, 8, 8, 1)
    sentence = "generates images only: for text, use another model"
    with pytest.raises(InputError, match=sentence):
        session.generate(4)
    with pytest.raises(InputError, match=sentence):
        generate_text(sampler, [["a"]], max_tokens=2)
    with pytest.raises(InputError, match="no text head"):
        MODEL.decode(config.model, sampler.params, None, None)


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"hourglass_ratio": 3},
            "model.max_patches=64 is not a multiple of model.hourglass_ratio=3",
        ),
        ({"chunk": 48}, "model.max_patches=64 is not a multiple of model.chunk=48"),
        ({"embed_dim": 10}, "model.embed_dim=10 must be a multiple of 4"),
        ({"max_patches": 256}, "model.max_patches=256, but data.image_size=8 is 64 patches"),
        ({"ssm": "scan"}, "model.ssm='scan' is none of auto, fft, chunked"),
        ({"num_heads": 4}, "unknown config key model.num_heads"),
    ],
)
def test_bad_config(keys, message):
    values = config_with()
    values.model.unlock()
    values.model.update(keys)
    with pytest.raises(InputError, match=message):
        make_config(values)


def test_adapters_are_refused():
    values = config_with()
    values.lora.rank, values.init_from = 4, "runs/base"
    with pytest.raises(InputError, match=r"lora.rank=4: a diffussm model has no matrices"):
        make_config(values)


def test_bad_data(tmp_path):
    config = make_config(config_with())
    with pytest.raises(InputError, match=r"shape \(8, 8, 3\) is not \[h, w, 1\]"):
        build_document([Image(np.zeros((8, 8, 3)), denoise=True)], ByteTokenizer(), config.layout)
    with pytest.raises(InputError, match=r"learns images only, but the document '.+' has none to"):
        run(train, TINY, "--config.data.mixture.say=1.0", "--processes=1",
            f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_configs_of_the_paper():
    for side, steps in ((32, 2_578_125), (64, 1_179_688)):
        file = ROOT / "configs" / f"diffussm_imagenet{8 * side}.py"
        config = load_config(str(file), [])
        assert (config.steps, config.model.max_patches) == (steps, side**2)
        assert config.max_images == 1 and config.model.predict_variance
        assert load_config(f"{file}:tiny", []).model.embed_dim == 16


def test_no_other_file_of_the_library_knows_the_model():
    """The seam: one line of the table, and nothing else, names the model."""
    own = {"models/diffussm.py", "nn/ssm.py", "bench/ssm.py"}
    named = {}
    for path in (ROOT / "monoformer_jax").rglob("*.py"):
        lines = [
            line for line in path.read_text().splitlines() if re.search("diffu_?ssm", line, re.I)
        ]
        if lines and str(path.relative_to(ROOT / "monoformer_jax")) not in own:
            named[path.name] = lines
    assert list(named) == ["__init__.py"] and len(named["__init__.py"]) == 2  # import, table
