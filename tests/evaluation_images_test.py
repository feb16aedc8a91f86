"""Sets of pictures, FID's InceptionV3 against recorded outputs, and `evaluate --images`."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from etils import epath
from fixtures import close, run

from monoformer_jax import evaluate
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import features, inception, record
from monoformer_jax.evaluation.frechet import Statistics, frechet_distance, precision_recall
from monoformer_jax.evaluation.image_set import open_image_set
from monoformer_jax.pretrained.folder import write_safetensors
from monoformer_jax.pretrained.table import Tensor, open_tree, write_tensors

# Of torch-fidelity 0.4.0's InceptionV3 in float64 (torch 2.14) with the weights of `tensor`, and the
# resizes of torch-fidelity, and of clean-fid 0.1.35 (every 13th row and 17th column).
RECORDED = ROOT / "tests" / "data" / "inception.npz"


def tensor(name, shape):
    """The weights of a seeded formula, as in the recorded network."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        values = 1 + 0.1 * np.tanh(values)
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * values
    elif name.endswith(("bn.bias", "running_mean")):
        values = 0.1 * values
    else:
        values = values * (2 / np.prod(shape[1:])) ** 0.5
    return values.astype(np.float32)


def image(height, width, seed):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    waves = np.sin(0.11 * (seed + 1) * y + 0.7 * c) + np.cos(0.07 * (seed + 2) * x - 0.5 * c)
    noise = np.random.RandomState(seed).uniform(-1, 1, (height, width, 3))
    return np.clip(127.5 + 50 * waves + 25 * noise, 0, 255).astype(np.uint8)


RECORDED_IMAGES = {"small": image(48, 64, 0), "large": image(330, 400, 1)}


def tensors():
    """Names and shapes of the weights."""
    return write_tensors(inception.table(), inception._shapes(), np.dtype(np.float32))


class Projections(inception.Inception):
    """An extractor of as many features as Inception's, which needs no network."""

    def __init__(self, weights=None, resize="adm"):
        self.resize, self.name = resize, f"InceptionV3 stub, resize {resize}"
        self.dims = {"pool": 2048, "spatial": 2023}

    def __call__(self, images):
        x = images.reshape(len(images), -1) / np.float32(255)
        sizes = {**self.dims, "logits": 1008}
        return {
            name: np.abs(x @ np.random.RandomState(size).standard_normal((x.shape[1], size)))
            for name, size in sizes.items()
        }


def pictures(folder, count, size=8, seed=0):
    """A folder of grey gradients with noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        values = rng.integers(0, 200, (size, size, 3)) + 50 * rng.random()
        PIL.Image.fromarray(values.astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


def arrays(path, **values):
    np.savez(path, **values)
    return path


def between(a, b):
    """In place of the Fréchet distance, whose eigenvalues of 2,048 features take many seconds."""
    return np.square(a.mean - b.mean).sum() + np.vdot(a.covariance, b.covariance)


def call(*arguments):
    return run(evaluate, *arguments)


def test_the_network_equals_the_recorded_one(tmp_path):
    """With weights in a file with the names of the PyTorch file."""
    made = {
        name: Tensor(x.shape, x.dtype, lambda name=name, x=x: tensor(name, x.shape))
        for name, x in tensors().items()
    }
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, made)
    network = inception.Inception(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert network.name == f"InceptionV3 {digest}, resize adm"
    found = network(RECORDED_IMAGES["small"][None])
    with np.load(RECORDED) as recorded:
        for part in ("pool", "spatial", "logits"):
            want = recorded[f"small/{part}"]
            close(found[part][0] / np.abs(want).max(), want / np.abs(want).max(), 1e-5)
            assert want.std() > 0.4
    assert {name: found[name].shape for name in network.dims} == {
        name: (1, dim) for name, dim in network.dims.items()
    }


@pytest.mark.parametrize("kind", inception.RESIZES)
def test_resizes_equal_the_recorded_ones(kind):
    with np.load(RECORDED) as recorded:
        for name, picture in RECORDED_IMAGES.items():
            got = np.asarray(inception.resize(picture[None], kind))[0, ::13, ::17]
            got = (got + 1) * 127.5 if kind == "pytorch_fid" else 128 * got + 128
            close(got, recorded[f"{name}/{kind}"], 1e-4)
            for other in set(inception.RESIZES) - {kind}:  # the variants are not the same
                assert np.abs(got - recorded[f"{name}/{other}"]).max() > 1


def test_the_weights_of_another_network_are_refused(tmp_path):
    shapes = tensors()
    assert len(shapes) == 471 and sum(np.prod(x.shape) for x in shapes.values()) == 23_884_384
    for names, message in (
        ({"fc.weight": (1000, 2048)}, r"fc.weight is \[1000, 2048\], expected \[1008, 2048\]"),
        ({"AuxLogits.fc.weight": (8, 8)}, r"unknown AuxLogits.fc.weight"),
    ):
        wrong = {n: Tensor(shape, np.dtype("f4"), lambda: None) for n, shape in names.items()}
        with pytest.raises(InputError, match=message):
            open_tree(inception.table(), {**shapes, **wrong}, inception._shapes())
    with pytest.raises(InputError, match="there is no file"):
        inception.load(tmp_path / "none.pth")


def test_scores_of_inception_features(tmp_path, capsys, monkeypatch):
    """The command, with statistics that it wrote; figures against the functions on the features."""
    monkeypatch.setattr(features, "frechet_distance", between)
    monkeypatch.setattr(features, "Inception", Projections)
    generated, real = pictures(tmp_path / "a", 6), pictures(tmp_path / "b", 7, seed=1)
    stats, file = tmp_path / "stats.npz", tmp_path / "scores.json"
    common = [f"--images={generated}", "--inception=weights.pth", f"--json={file}"]
    call(*common, f"--reference={real}", f"--statistics={stats}")
    said, scores = capsys.readouterr().out, json.loads(file.read_text())
    assert "FID" in said and "6 generated pictures are fewer than the 2,049" in said
    assert scores["extractor"] == "InceptionV3 stub, resize adm"
    a, b = (
        Projections()(np.concatenate(list(open_image_set(epath.Path(x)).batches(64))))
        for x in (generated, real)
    )
    for key, part in (("frechet", "pool"), ("sfid", "spatial")):
        sets = (Statistics(x[part].mean(0), np.cov(x[part].T)) for x in (a, b))
        assert scores[key] == pytest.approx(between(*sets), rel=1e-5)
    assert (scores["precision"], scores["recall"]) == precision_recall(a["pool"], b["pool"])
    assert scores["inception_score"] > 1 and np.isfinite(scores["kid"])
    assert (scores["count"], scores["reference_count"]) == (6, 7)
    # The statistics alone: the same distances, and no figure that needs the features.
    call(*common, f"--reference={stats}")
    again = json.loads(file.read_text())
    assert again["frechet"] == pytest.approx(scores["frechet"])
    assert again["reference_count"] == 7 and not {"kid", "precision"} & again.keys()
    assert "KID, precision and recall are not measured" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"of the extractor 'InceptionV3 stub, resize adm', not of"
    ):
        call(*common, f"--reference={stats}", "--resize=clean_fid")
    wide = pictures(tmp_path / "wide", 4, size=9)
    with pytest.raises(InputError, match=r"9×9 pixels and .* of 8×8: scores of two resolutions"):
        call(f"--images={wide}", "--inception=weights.pth", f"--reference={stats}")


def test_statistics_of_adm(tmp_path, monkeypatch):
    """Its reference has pictures, and statistics of more than these: the statistics count."""
    monkeypatch.setattr(features, "frechet_distance", between)
    rng = np.random.default_rng(0)
    values = {"arr_0": rng.integers(0, 255, (5, 8, 8, 3), np.uint8)}
    for end, dim in (("", 2048), ("_s", 2023)):
        values |= {f"mu{end}": rng.normal(size=dim), f"sigma{end}": np.eye(dim, dtype=np.float32)}
    reference = open_image_set(epath.Path(arrays(tmp_path / "adm.npz", **values)))
    found = features.extract(reference, Projections(), "reference")
    assert found.vectors.shape == (5, 2048) and found.count == 0
    np.testing.assert_array_equal(found.statistics["pool"].mean, values["mu"])
    np.testing.assert_array_equal(found.statistics["spatial"].covariance, np.eye(2023))
    again = open_image_set(
        epath.Path(arrays(tmp_path / "b.npz", **(values | {"mu": values["mu"] + 1})))
    )
    other = features.extract(again, Projections(), "reference")
    assert other.digest != found.digest
    assert features.compare(found, other)["frechet"] == pytest.approx(2 * 2048)
    bad = arrays(tmp_path / "bad.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(InputError, match="not of the 2048 features of InceptionV3"):
        features.extract(open_image_set(epath.Path(bad)), Projections(), "reference")


def test_scores_of_pixels_and_their_spread(tmp_path, capsys):
    """Three sets; the mean and the spread; the record of the run."""
    sets = [pictures(tmp_path / f"seed{seed}", 30, seed=seed) for seed in range(3)]
    real, file, workdir = (
        pictures(tmp_path / "real", 40, seed=9),
        tmp_path / "s.json",
        tmp_path / "run",
    )
    workdir.mkdir()
    facts = {"workdir": "runs/x", "step": 7, "config": {"sampling": {"solver": "heun", "steps": 20,
             "guidance": 1.5}}}  # fmt: skip
    for seed, folder in enumerate(sets):
        (folder / "samples.json").write_text(json.dumps(facts | {"seed": seed}))
    options = [f"--reference={real}", f"--json={file}", f"--workdir={workdir}"]
    call(*(f"--images={folder}" for folder in sets), *options)
    said, scores = capsys.readouterr().out, json.loads(file.read_text())
    assert "FID" not in said and "pixels 8x8x3" in said
    flat = [
        np.concatenate(list(open_image_set(epath.Path(x)).batches(7))).reshape(-1, 192) / 127.5
        for x in (*sets, real)
    ]
    each = [frechet_distance(x, flat[-1]) for x in flat[:3]]
    assert scores["frechet"] == pytest.approx(np.mean(each), rel=1e-4)
    assert scores["frechet_spread"] == pytest.approx(np.std(each, ddof=1), rel=1e-3)
    assert not {"sfid", "inception_score"} & scores.keys()
    assert scores["seed"] == [0, 1, 2] and scores["checkpoint_step"] == 7 and scores["ema"] is True
    assert (scores["solver"], scores["sampling_steps"], scores["guidance"]) == ("heun", 20, 1.5)
    with open(workdir / "evaluations.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"cut')  # a damaged line hides no other one
    call(f"--images={sets[0]}", *options, "--pixels=4")
    first, second = record.read(epath.Path(workdir))
    assert first["scores"]["frechet"] == scores["frechet"]
    assert first["provenance"]["extractor"] == "pixels 8x8x3"
    assert second["provenance"]["extractor"] == "pixels 4x4x3"


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed"])
def test_pictures_are_read_in_order_and_in_batches(tmp_path, kind):
    folder = pictures(tmp_path / "a", 5)
    want = np.stack([np.asarray(PIL.Image.open(x)) for x in sorted(folder.iterdir())])
    path = folder if kind == "folder" else tmp_path / "a.npz"
    if kind != "folder":
        {"npz": np.savez, "compressed": np.savez_compressed}[kind](path, want)
    found = open_image_set(epath.Path(path))
    assert (found.count, found.height, found.width) == (5, 8, 8)
    batches = list(found.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), want)


def bad_sets(folder):
    """(arguments, the sentence) of sets that cannot be measured."""
    good, mixed = pictures(folder / "good", 5), pictures(folder / "mixed", 5)
    PIL.Image.new("RGB", (9, 8)).save(mixed / "later.png")
    broken, empty = pictures(folder / "broken", 2), folder / "empty"
    (broken / "x.png").write_bytes(b"no picture")
    empty.mkdir()
    (folder / "text.npz").write_text("text")
    cut = arrays(folder / "cut.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    floats = arrays(folder / "floats.npz", arr_0=np.zeros((5, 8, 8, 3), np.float32))
    grey = arrays(folder / "grey.npz", arr_0=np.zeros((5, 8, 8), np.uint8))
    other = arrays(folder / "other.npz", x=np.zeros(3))
    stats = arrays(folder / "stats.npz", mu=np.zeros(192), sigma=np.eye(192))
    mine = arrays(folder / "mine.npz", mu=np.zeros(192), sigma=np.full((192, 192), np.nan),
                  extractor="pixels 8x8x3", count=9, height=8, width=8)  # fmt: skip
    a, b = f"--images={good}", f"--reference={good}"
    return [
        ([a], "--images needs --reference"),
        ([b], "give --workdir, a trained run, or --images"),
        ([a, "--reference=none"], "there is no folder and no file none"),
        ([a, f"--reference={empty}"], "empty has no pictures"),
        ([a, f"--reference={mixed}"], "mixes sizes: 000.png has 8×8 pixels, later.png has 9×8"),
        ([a, f"--reference={broken}"], "cannot be read as an image"),
        ([a, f"--reference={folder / 'text.npz'}"], "text.npz is damaged"),
        ([f"--images={floats}", b], r"arr_0 is float32\[5, 8, 8, 3\], not uint8 \[n, height"),
        ([f"--images={grey}", b], r"arr_0 is uint8\[5, 8, 8\], not uint8"),
        ([f"--images={other}", b], "has neither pictures .* it has x"),
        ([f"--images={stats}", b], "has statistics and no pictures"),
        ([a, f"--reference={stats}"], "statistics of Inception features and no pictures: give the"),
        ([a, f"--reference={mine}"], "statistics are not finite"),
        ([a, b, "--pixels=9"], "--pixels=9 is more than the 8×8"),
        ([a, b, "--resize=clean_fid"], "is of Inception: give --inception"),
        ([a, b, "--inception=none.pth"], "there is no file none.pth"),
        ([a, b, "--pixels=8", "--inception=x"], "exclude each other"),
        ([a, b, "--seeds=2"], "of pictures, give --images once per seed"),
        ([a, b, "--checkpoint=3"], "--checkpoint is of a model"),
        ([a, b, "--statistics=x.txt"], "must end in .npz"),
        ([a, b, f"--statistics={cut}"], "cut.npz exists, and this command did not write it"),
        ([a, b, f"--json={folder / 'none' / 'a.json'}"], "there is no folder"),
        ([a, b, f"--workdir={folder / 'none'}"], "there is no folder"),
    ]  # fmt: skip


def test_sets_that_cannot_be_measured(tmp_path):
    for arguments, sentence in bad_sets(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=sentence) as error:
            call(*arguments)
        assert "\n" not in str(error.value), arguments
        assert sorted(tmp_path.rglob("*")) == before, arguments
    for place, size in ((Path(tmp_path / "cut.npz"), 300), (Path(tmp_path / "floats.npz"), 60)):
        place.write_bytes(place.read_bytes()[:size])
        with pytest.raises(InputError, match="is damaged"):
            open_image_set(epath.Path(place))
