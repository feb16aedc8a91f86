"""Held-out examples and losses, what a run shows while it trains, and the page about its data."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from etils import epath
from fixtures import run as call

import monoformer_jax
from monoformer_jax import evaluate, train
from monoformer_jax.batch import PATCH, unpatchify
from monoformer_jax.config import MeshConfig, ValidationConfig
from monoformer_jax.config_values import build
from monoformer_jax.data import sources
from monoformer_jax.data.digits import digits
from monoformer_jax.data.documents import EndOfTurn, Image, Prompt, UntrainedText
from monoformer_jax.data.held_out import is_trained, open_held_out, stack_rows
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.records import write_records
from monoformer_jax.data.sources import Source
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import drawn, features, record
from monoformer_jax.evaluation.held_out import LEVELS, HeldOutLoss
from monoformer_jax.evaluation.inspection import mask_picture, measure_sources
from monoformer_jax.evaluation.report import add_evaluations, write_report
from monoformer_jax.evaluation.samples import Samples, caption, drawing, in_turn
from monoformer_jax.evaluation.validation import Validation
from monoformer_jax.models import monoformer
from monoformer_jax.parallel import make_mesh
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.outputs import pictures_of
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training import loop

TOKENIZER = ByteTokenizer()
PIXELS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)


def held_out(config, rows=8):
    return open_held_out(
        config.data, config.layout, TOKENIZER, rows=rows, max_images=config.max_images,
        text_beside_images=True,
    )  # fmt: skip


def test_the_side_of_an_example_depends_on_its_first_image_or_its_text():
    image = Image(PIXELS, denoise=True)
    alike = [
        [Prompt(("a cat", "an animal")), image],
        [image, "a cat"],
        (PIXELS, 3),
        [EndOfTurn(), Image(PIXELS, denoise=False), Image(PIXELS + 1, denoise=True)],
    ]
    for split in (0.1, 0.3, 0.5, 0.9):
        assert len({is_trained(example, split) for example in alike}) == 1
    texts = [f"sentence {i}" for i in range(4000)]
    out = [text for text in texts if not is_trained([UntrainedText("q"), text], 0.2)]
    assert len(out) == pytest.approx(800, abs=80)  # 3 standard deviations
    # A larger share holds out the same ones and more.
    assert all(not is_trained([UntrainedText("q"), text], 0.3) for text in out)
    with pytest.raises(InputError, match="an example of type object has no image or text"):
        is_trained(object(), 0.1)


def images_of(batch, config):
    """Bytes of every image of a batch or a row."""
    found = set()
    ids, types = batch["image_ids"], batch["token_types"]
    for image in range(1, ids.max() + 1):
        patches = batch["patches"][(ids == image) & (types == PATCH)]
        found.add(unpatchify(patches, 8, 8, config.layout.patch_size).tobytes())
    return found


def test_held_out_examples_are_measured_and_never_trained(change):
    """Two tasks show the same digits, and the held-out ones are in neither's training rows."""
    config = change(data={"validation_split": 0.3, "shift_pixels": 0})
    found = held_out(config, rows=20)
    measured = set().union(*(images_of(row, config) for row in found.rows))
    batches = Batches(config, TOKENIZER).iterator
    trained = set()
    for _ in range(20):
        trained |= set().union(*(
            images_of({k: x[row] for k, x in batch.items()}, config)
            for batch in [next(batches)] for row in range(config.batch_size)
        ))  # fmt: skip
    everything = {image.tobytes() for image in digits("train")[0]}
    assert len(measured) > 30 and len(trained) > 100
    assert measured | trained <= everything and not measured & trained
    # The same on every host and in another batch; all sources are there, by weight.
    again = held_out(dataclasses.replace(config, batch_size=8, seed=5), rows=20)
    for a, b in zip(found.rows, again.rows, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert set(found.examples) == {"draw", "read", "say"} and len(found.rows) == 20


def test_a_folder_of_its_own_is_held_out_whole(change, tmp_path):
    train, other = ([[Prompt((f"{name} {i}",)), Image(PIXELS * i / 9, True)] for i in range(9)]
                    for name in ("train", "held"))  # fmt: skip
    write_records(tmp_path / "train", train)
    write_records(tmp_path / "held", other)
    data = {"mixture": {"pictures": 1.0}, "records": {"pictures": str(tmp_path / "train")},
            "validation_records": {"pictures": str(tmp_path / "held")}}  # fmt: skip
    config = change(data=data)
    words = [caption(parts[:1]) for parts in held_out(config).examples["pictures"]]
    assert sorted(words) == [f"held {i}" for i in range(9)]
    with pytest.raises(
        InputError, match=r"validation_records.cats is of no source: data.mixture has"
    ):
        change(data={"validation_records": {"cats": "x"}})


def test_splits_that_hold_out_all_or_nothing_are_refused(change, monkeypatch):
    texts = list(map(str, range(99)))
    trained = [text for text in texts if is_trained(text, 0.5)]
    few = Source(trained[:5], lambda example, rng: [example])
    monkeypatch.setitem(sources.SOURCES, "say", lambda c, _: few)
    config = change(data={"mixture": {"say": 1.0}, "validation_split": 0.5})
    with pytest.raises(InputError, match="holds out none of the examples"):
        held_out(config)
    few.examples[:] = [text for text in texts if text not in trained]
    with pytest.raises(InputError, match="leaves no example of say to train"):
        Batches(config, TOKENIZER)


def test_keys_are_checked(change):
    with pytest.raises(InputError, match="there is nothing to measure or draw"):
        change(validation={"every": 5})
    with pytest.raises(InputError, match="one must be a multiple of the other"):
        change(validation={"every": 7, "prompts": ("a",)}, checkpoint_every=10)
    with pytest.raises(InputError, match=r"validation.prompts='a' is not a list"):
        build(ValidationConfig, {"prompts": "a"}, "validation.")
    assert build(ValidationConfig, {"prompts": ["a", "b"]}).prompts == ("a", "b")


@pytest.fixture(scope="module")
def model(config):
    params = monoformer.init(config.model, jax.random.key(1))
    # The image head starts at 0.
    noise = jax.random.normal(jax.random.key(2), params["image_head"]["out"]["kernel"].shape)
    params["image_head"]["out"]["kernel"] = noise * 0.1
    return Sampler(config, params, TOKENIZER)


def test_the_losses_are_means_over_tokens_and_images_at_fixed_noise(model):
    """Each row alone, with numpy's means: the model is the only code that is shared."""
    config = model.config
    data = dataclasses.replace(config.data, validation_split=0.3)
    rows = held_out(dataclasses.replace(config, data=data), rows=6).rows
    losses = HeldOutLoss(model, rows)
    got = losses(model.params)
    again = losses(model.params)
    assert got == again and losses._sums._cache_size() == 1

    texts, images = [], {level: [] for level in LEVELS}
    forward = jax.jit(monoformer.forward, static_argnums=0)
    for number, row in enumerate(rows):
        batch = {name: values[None] for name, values in row.items()}
        _, key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        noise = np.asarray(jax.random.normal(key, row["patches"].shape))
        ids, denoise = row["image_ids"], row["denoise"]
        denoised = sorted(set(ids[denoise]))
        for level in LEVELS:
            times = np.zeros((1, config.max_images), np.float32)
            times[0, [i - 1 for i in denoised]] = level
            x_t = np.where(denoise[:, None], (1 - level) * row["patches"] + level * noise,
                           row["patches"]).astype(np.float32)  # fmt: skip
            out = forward(config.model, model.params, batch, x_t[None], times)
            error = (np.asarray(out.prediction[0]) - (noise - row["patches"])) ** 2
            for image in denoised:
                here = (ids == image) & (row["token_types"] == PATCH)
                images[level].append(error[here].mean())
            logits = np.asarray(out.text_hidden[0] @ model.params["text_head"], np.float64)
            logits = logits[:, : config.layout.vocab_size]
            log_z = np.log(np.exp(logits).sum(-1))
            chosen = logits[np.arange(len(ids)), row["targets"]]
            texts += (log_z - chosen)[row["target_weights"] > 0].tolist()
    assert got["text_loss"] == pytest.approx(np.mean(texts), rel=1e-4)
    for level in LEVELS:
        assert got[f"image_loss_t{level}"] == pytest.approx(np.mean(images[level]), rel=1e-4)
    assert got["image_loss"] == pytest.approx(np.mean(list(images.values())), rel=1e-4)
    assert got["loss"] == pytest.approx(got["text_loss"] + got["image_loss"])

    # On a mesh, and in batches that are filled up with padding.
    sharded = dataclasses.replace(model, mesh=make_mesh(MeshConfig()))
    assert len(stack_rows(rows, config.layout, 4, 0)) == 2
    for name, value in HeldOutLoss(sharded, rows)(model.params).items():
        assert value == pytest.approx(got[name], rel=1e-5), name


def test_samples_are_the_held_out_prompts_or_those_of_the_config(model):
    c = ValidationConfig(samples=2)
    edit = [Image(PIXELS, False), "make it red", Image(-PIXELS, True)]
    chat = [UntrainedText("### Human: "), Image(PIXELS, False), UntrainedText("what?"), "a cat",
            EndOfTurn()]  # fmt: skip
    examples = {
        "draw": [["a cat", EndOfTurn(), Image(PIXELS, True)]] * 2 + [[Image(PIXELS, True)]],
        "edit": [edit],
        "chat": [chat],
        "say": [["one plus one is two"]],
    }
    samples = Samples(model, c, examples)
    assert [d.words for d in samples.drawings] == ["a cat", "[picture] make it red"]
    np.testing.assert_array_equal(samples.drawings[1].target, -PIXELS)
    assert [(r.words, r.answer) for r in samples.readings] == [
        ("### Human: [picture] what?\0a cat", "a cat")
    ]
    given = Samples(model, dataclasses.replace(c, prompts=("a", "b", "c")), examples)
    assert [d.words for d in given.drawings] == ["a", "b", "c"]

    latent = dataclasses.replace(
        model.config, model=dataclasses.replace(model.config.model, channels=4)
    )
    latent = dataclasses.replace(model, config=latent)
    none = Samples(latent, c, {"draw": [["a", Image(np.zeros((8, 8, 4), np.float32), True)]]})
    assert not none.drawings and "validation.vae" in none.missing
    with pytest.raises(InputError, match="give its autoencoder"):
        Samples(latent, dataclasses.replace(c, prompts=("a",)), {})


SMALL = {"every": 5, "rows": 8, "samples": 2}


@pytest.fixture(scope="module")
def shown(config, tmp_path_factory):
    """A run of 10 steps that is measured at 0, 5 and 10; and its config."""
    config = dataclasses.replace(
        config,
        steps=10, checkpoint_every=5,
        data=dataclasses.replace(config.data, validation_split=0.2),
        sampling=dataclasses.replace(config.sampling, steps=2),
        validation=ValidationConfig(**SMALL),
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("runs") / "shown"
    loop.train(config, workdir, open_validation=Validation)
    return workdir, config


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_shows_held_out_losses_samples_and_a_report(shown):
    workdir, config = shown
    by_step = {line["step"]: line for line in lines(workdir)}
    assert list(by_step) == list(range(11))
    measured = [step for step, line in by_step.items() if "val_loss" in line]
    assert measured == [0, 5, 10]
    assert by_step[10]["val_loss"] < by_step[0]["val_loss"]
    assert {f"val_image_loss_t{level}" for level in LEVELS} <= by_step[5].keys()
    # Every report after the first step says how fast it was.
    for step in range(2, 11):
        assert by_step[step]["step_ms"] > 0 and 0 <= by_step[step]["data_wait_share"] <= 1
        rate = by_step[step]["tokens_per_s"] * by_step[step]["step_ms"] / 1e3
        assert rate == pytest.approx(config.batch_size * config.data.max_seq_len, rel=1e-6)
    assert by_step[1]["memory_gib"] > 0.1 and "step_ms" not in by_step[1]

    records = [json.loads((workdir / "samples" / f"{s}.json").read_text()) for s in measured]
    assert {len(r["prompts"]) for r in records} == {len(r["answers"]) for r in records} == {2}
    pictures = [PIL.Image.open(workdir / "samples" / f"{s}.png") for s in measured]
    assert {p.size for p in pictures} == {(128, 256)}
    assert len({p.tobytes() for p in pictures}) == 3  # other weights, the same noise

    page = (workdir / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page
    assert page.count("data:image/png") == 2 * (3 + 1) + 2  # drawn at 3 steps, held out; read
    for text in ("step 10 of 10", "<svg", "&quot;validation_split&quot;: 0.2", jax.__version__):
        assert text in page
    for prompt, answer in records[0]["questions"]:
        assert prompt in page and answer in page


def test_tensorboard_has_the_samples(shown):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(shown[0] / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [0, 5, 10]
    assert [s.step for s in events.Scalars("val_text_loss")] == [0, 5, 10]
    assert len(events.Tensors("readings")) == 3


def test_a_resumed_run_is_the_same_with_and_without_validation(shown, tmp_path):
    workdir, config = shown
    silent = dataclasses.replace(config, validation=ValidationConfig())
    for name, resumed in (("cut", config), ("silent", silent)):
        shutil.copytree(workdir, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "10")
        (tmp_path / name / "report.html").unlink()
        loop.train(resumed, tmp_path / name, open_validation=Validation)
        for a, b in zip(lines(tmp_path / name), lines(workdir), strict=True):
            keys = [k for k in b if "loss" in k or k in ("step", "grad_norm")]
            keys = [k for k in keys if name == "cut" or b["step"] < 10 or "val_" not in k]
            assert [a[k] for k in keys] == [b[k] for k in keys]
    for name in ("10.png", "10.json"):
        pair = [folder / "samples" / name for folder in (workdir, tmp_path / "cut")]
        assert pair[0].read_bytes() == pair[1].read_bytes()
    assert (tmp_path / "cut" / "report.html").exists()
    assert not (tmp_path / "silent" / "report.html").exists()


def test_evaluate_measures_what_the_run_measured(shown, tmp_path, monkeypatch, capsys):
    workdir, _ = shown
    from monoformer_jax.evaluation import digits as of_digits

    monkeypatch.setattr(
        of_digits, "evaluate", lambda model, log, seeds: ({}, np.zeros((80, 8, 8, 1)))
    )
    (tmp_path / "out").mkdir()
    file = tmp_path / "scores.json"
    options = [f"--workdir={workdir}", f"--json={file}", f"--out={tmp_path / 'out'}"]
    call(evaluate, *options, "--checkpoint=best")
    for name in ("loss.png", "samples.png"):  # so that the next call replaces them
        assert pictures_of("monoformer_jax evaluate")(tmp_path / "out" / name)
    scores, last = json.loads(file.read_text()), lines(workdir)[-1]
    for name in ("val_loss", "val_text_loss", "val_image_loss", "val_image_loss_t0.5"):
        assert scores[name] == pytest.approx(last[name], rel=1e-5)
    assert scores["steps"] == 10 and "cross-entropy of held-out text" in capsys.readouterr().out
    (line,) = record.read(epath.Path(tmp_path / "out"))
    assert line["scores"]["val_loss"] == scores["val_loss"]
    facts = {"checkpoint_step": 10, "ema": True, "seeds": 1, "solver": "heun", "guidance": 2.0}
    assert facts.items() <= line["provenance"].items()
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "out" / "loss.png")
    with pytest.raises(InputError, match=r"loss.png exists, and this command did not write it"):
        call(evaluate, *options)
    assert PIL.Image.open(tmp_path / "out" / "loss.png").size == (4, 4)
    with pytest.raises(InputError, match="has no checkpoint of step 7; it has 5, 10"):
        call(evaluate, f"--workdir={workdir}", f"--out={tmp_path}", "--checkpoint=7")


def test_drawings_of_held_out_prompts(shown, capsys):
    """Of any run: figures of two seeds beside the pictures that were held out with the prompts."""
    workdir, config = shown
    model = monoformer_jax.load(workdir)
    examples = held_out(config).examples
    settings = (examples, 12, 2, lambda images: features.open_extractor(images, None, "adm", None))
    scores, facts = drawn.evaluate(model, *settings, print)
    chosen = [x for x in map(drawing, in_turn(examples.values())) if x is not None][:12]
    true, errors = np.stack([x.target for x in chosen]), []
    for seed in range(2):
        got = generate_images(model, [x.prompt for x in chosen], size=(8, 8), seed=seed)
        errors.append(np.abs(np.clip(got, -1, 1) - true).mean())
    assert scores["heldout_pixel_error"] == pytest.approx(np.mean(errors), abs=0.01)
    assert scores["heldout_pixel_error_spread"] == pytest.approx(np.std(errors, ddof=1), abs=0.01)
    assert {"heldout_frechet", "heldout_kid", "heldout_recall", "heldout_top1"} <= scores.keys()
    assert facts["extractor"] == "pixels 8x8x3" and facts["count"] == 12
    assert "12 generated pictures are fewer than the 193" in capsys.readouterr().out
    said = []
    assert drawn.evaluate(model, {"say": [["no picture"]]}, *settings[1:], said.append) == ({}, {})
    assert "fewer than two held-out examples have a prompt and a picture" in said[0]


def test_the_report_shows_evaluations_and_keeps_its_warnings(shown, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(shown[0], workdir)
    write_report(workdir, ["it <forgets>"])
    record.append(workdir, {"frechet": 2.5, "frechet_spread": 0.125}, {"extractor": "<x>"})
    add_evaluations(workdir)
    page = (workdir / "report.html").read_text()
    assert "frechet 2.5 ± 0.125" in page and "extractor &lt;x&gt;" in page
    assert '<p class="warning">it &lt;forgets&gt;</p>' in page
    (workdir / "report.html").write_text("mine")
    add_evaluations(workdir)
    assert (workdir / "report.html").read_text() == "mine"


def test_a_run_from_weights_warns_when_it_forgets(shown, tmp_path, capsys):
    """Trained to say sentences, at a rate that destroys the model; the base also drew and read."""
    base, config = shown
    tuned = dataclasses.replace(
        config, init_from=str(base), steps=5,
        data=dataclasses.replace(config.data, mixture={"say": 1.0}),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0, warmup_steps=0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs open_validation"):
        loop.train(tuned, tmp_path / "tuned")
    loop.train(tuned, tmp_path / "tuned", open_validation=Validation)
    first, last = lines(tmp_path / "tuned")[0], lines(tmp_path / "tuned")[-1]
    of_base = lines(base)[-1]
    # The held-out part of the base's data: at step 0 exactly what the base measured last.
    for name in ("text_loss", "image_loss"):
        assert first[f"base_{name}"] == pytest.approx(of_base[f"val_{name}"], rel=1e-5)
    assert last["base_text_loss"] > 1.1 * first["base_text_loss"]
    out = capsys.readouterr().out
    warning = "WARNING: at step 5 the text loss on data of init_from examples is"
    assert warning in out and "(validation.margin=0.1)" in out
    assert f"(step 0: {first['base_text_loss']:.4f})" in out
    assert 'class="warning"' in (tmp_path / "tuned" / "report.html").read_text()


def test_inspect_shows_the_data_and_writes_only_its_page(config, tmp_path, capsys):
    page = tmp_path / "data.html"
    arguments = ["--config=configs/digits.py:tiny", f"--workdir={tmp_path / 'run'}",
                 f"--inspect={page}", "--config.data.validation_split=0.2"]  # fmt: skip
    call(train, *arguments)
    call(train, *arguments)  # replaces its own page
    assert sorted(tmp_path.iterdir()) == [page]
    assert "nothing was trained" in capsys.readouterr().out
    text = page.read_text()
    batch = next(Batches(dataclasses.replace(config, data=dataclasses.replace(
        config.data, validation_split=0.2)), TOKENIZER).iterator)  # fmt: skip
    first = {name: values[0] for name, values in batch.items()}
    assert text.count('class="document"') == sum(batch["segment_ids"][row].max() for row in (0, 1))
    # Each learned token of the first row is listed with its target.
    shown = re.findall(r"<td>target (?!-).*?</td><td>weight 1</td>", text.split("<h3>Row 2")[0])
    assert len(shown) == (first["target_weights"] > 0).sum()
    call(train, *arguments, "--config.data.mixture.page=1", "--config.data.noised_copies=True",
         "--config.model.original.time_conditioning=modulation")  # fmt: skip
    kinds = re.findall(r"16 PATCH<br>([a-z ]+)", page.read_text())
    assert kinds.count("noised copy") >= 2 and {"generated", "looked at"} < set(kinds)
    page.write_text("mine")
    with pytest.raises(InputError, match=r"data.html exists, and this command did not write it"):
        call(train, *arguments)
    with pytest.raises(InputError, match=r"must end in .html"):
        call(train, *arguments, f"--inspect={tmp_path / 'data.txt'}")


def test_the_numbers_of_a_source_are_counted(change, monkeypatch):
    """Two documents of three fit in a row of 64 tokens."""
    texts = ["a" * 10, "b" * 20, "c" * 100]
    made = Source(texts, lambda example, rng: [example])
    monkeypatch.setitem(sources.SOURCES, "say", lambda c, _: made)
    config = change(data={"mixture": {"say": 1.0}, "max_seq_len": 64})
    found = measure_sources(Sampler(config, {}, TOKENIZER))["say"]
    assert found.examples == 3 and found.held_out == 0 and found.images == 0
    assert sorted(found.lengths) == [12, 22, 102]
    assert found.too_long == pytest.approx(1 / 3)


def test_the_picture_of_the_mask_is_the_rule(config):
    """Query q sees its document up to itself, a PATCH up to the end of its image."""
    row = {name: values[0] for name, values in next(Batches(config, TOKENIZER).iterator).items()}
    seen = (np.asarray(mask_picture(row)) != 255).any(-1)
    types, segments, images = row["token_types"], row["segment_ids"], row["image_ids"]
    for q, k in np.random.default_rng(0).integers(0, len(types), (2000, 2)):
        same = segments[q] == segments[k] > 0
        in_image = types[q] == PATCH and images[q] == images[k]
        assert seen[q, k] == (same and (k <= q or in_image)), (q, k)


def test_the_best_checkpoint_is_kept_beside_the_newest(config, tmp_path):
    """Of losses 3, 1, 2, 2.5 at steps 10 to 40, with one newest kept."""
    from monoformer_jax.training.state import init_train_state

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, batches = init_train_state(config, mesh), Batches(config, TOKENIZER)
    kept = []
    with Checkpoints(tmp_path, kept=1) as saved:
        for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.5)):
            here = state.replace(step=state.step + step)
            measured = {} if loss is None else {"val_loss": loss}
            saved.save(here, batches.iterator, 0.0, measured)
            saved.wait()
            kept.append((saved.steps, saved.best))
    assert kept[1][0][-1] == 20 and kept[2] == ([20, 30], 20) and kept[3] == ([20, 40], 20)
    with Checkpoints(tmp_path) as saved:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.ema)
        assert saved.restore_ema(abstract, "best")[1]["step"] == 20
        assert saved.restore_ema(abstract)[1]["step"] == 40
