"""Documents, packing and the data pipeline: no lost or split documents, deterministic order."""

import contextlib
import itertools
import json

import grain
import numpy as np
import pytest

from monoformer_jax import batch as contract
from monoformer_jax.batch import PATCH, TEXT, TIME
from monoformer_jax.data import sources
from monoformer_jax.data.digits import NAMES, digits, draw_prompt, reduce_images, sentences
from monoformer_jax.data.documents import (
    EndOfTurn,
    Image,
    Prompt,
    UntrainedText,
    build_document,
    describe,
    draw_prompts,
    split_document,
)
from monoformer_jax.data.packing import Pack, SplitToRows, fill
from monoformer_jax.data.pipeline import Batches, check_streams
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.models import named_size
from monoformer_jax.models.monoformer import MonoFormerConfig

TOKENIZER = ByteTokenizer()
MODEL = MonoFormerConfig(**named_size("tiny"))
PIXELS = np.arange(16, dtype=np.float32).reshape(4, 4, 1) / 16


def test_bytes_round_trip_and_special_names_are_plain_text():
    for text in ("draw a one", "naïve — 数字", "<|im_start|></s>", ""):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert all(6 <= i < TOKENIZER.vocab_size for i in ids)


def test_fields_of_a_document():
    document = build_document(["ab", Image(PIXELS, denoise=True), "c"], TOKENIZER, MODEL.layout)
    s, e, i, start, end = 1, 2, 3, 4, 5
    a, b, c = TOKENIZER.encode("abc")
    assert document["tokens"].tolist() == [s, a, b, start, i, i, i, i, i, end, c, e]
    assert document["token_types"].tolist() == [TEXT] * 4 + [TIME] + [PATCH] * 4 + [TEXT] * 3
    weights = document["target_weights"]
    #                        s a b start T p p p p end c e
    assert weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    learned = document["targets"][weights > 0]
    assert learned.tolist() == [a, b, start, end, c, e]
    patches, grid = contract.patchify(PIXELS, 2)
    np.testing.assert_array_equal(document["patches"][5:9], patches)
    np.testing.assert_array_equal(document["patch_positions"][5:9], grid)
    assert document["denoise"].tolist() == [False] * 4 + [True] * 5 + [False] * 3


def test_the_originals_rule_drops_text_beside_denoised_images_only():
    painted = build_document(
        ["a", Image(PIXELS, True)], TOKENIZER, MODEL.layout, text_beside_images=False
    )
    shown = build_document(
        ["a", Image(PIXELS, False)], TOKENIZER, MODEL.layout, text_beside_images=False
    )
    assert painted["target_weights"].sum() == 0 and shown["target_weights"].sum() == 4


def turn(question, answer):
    return [UntrainedText(question), answer, EndOfTurn()]


def test_a_long_chat_is_split_between_turns_and_keeps_its_image():
    """Each piece is the document that its turns alone would make."""
    turns = [
        turn("a?", "bc"),
        turn("de?", "f"),
        turn("g?", "h" * 9),
        turn("ij?", "k"),
        turn("l", "m"),
    ]
    shown = Image(PIXELS, denoise=False)
    for head in ([], [shown], [shown, Image(-PIXELS, denoise=False)]):

        def build(*chosen, head=head):
            return build_document([*head, *itertools.chain(*chosen)][:-1], TOKENIZER, MODEL.layout)

        room = 1 + 7 * len(head)
        whole = build(*turns)
        assert split_document(whole, len(whole["tokens"]), TOKENIZER) == [whole]
        for length, chosen in ((room + 12, [turns[:2], turns[2:3], turns[3:]]),
                               (room + 17, [turns[:2], turns[2:4], turns[4:]])):  # fmt: skip
            pieces = split_document(whole, length, TOKENIZER)
            assert len(pieces) == len(chosen)
            for piece, some in zip(pieces, chosen):
                want = build(*some)
                for name in want:
                    real = slice(-1) if name == "targets" else slice(None)
                    np.testing.assert_array_equal(piece[name][real], want[name][real], name)
                    assert piece[name].dtype == want[name].dtype
        # The third turn is longer than this row: its end is lost, the others are not.
        cut = split_document(whole, room + 8, TOKENIZER)
        assert [len(piece["tokens"]) - room for piece in cut] == [5, 5, 8, 8]
        assert cut[2]["target_weights"][-2:].tolist() == [1, 0]
        # Of these only the short answers fit, and of the second none is seen.
        assert (
            len(split_document(build(turn("a" * 30, "b"), turn("c", "d")), room + 3, TOKENIZER))
            == 1
        )
        assert not split_document(whole, room - 1, TOKENIZER)


def test_a_later_image_is_renumbered_and_never_cut():
    late = Image(-PIXELS, denoise=False)
    parts = [
        Image(PIXELS, denoise=False),
        *turn("a?", "bcd"),
        UntrainedText("e"),
        late,
        *turn("", "f"),
    ]
    whole = build_document(parts[:-1], TOKENIZER, MODEL.layout)
    first, second = split_document(whole, 19, TOKENIZER)
    want = build_document([parts[0], *parts[4:-1]], TOKENIZER, MODEL.layout)
    np.testing.assert_array_equal(second["image_ids"], want["image_ids"])
    np.testing.assert_array_equal(second["patches"], want["patches"])
    assert first["image_ids"].max() == 1 and second["image_ids"].max() == 2
    assert not split_document(whole, 16, TOKENIZER)


def test_a_prompt_stays_with_what_it_asks_for():
    rng = np.random.default_rng(0)
    asked = draw_prompts([Prompt(("ab",)), "cdefg"], rng, 0.0, end_of_prompt=True)
    text = build_document(asked, TOKENIZER, MODEL.layout)
    (cut,) = split_document(text, 6, TOKENIZER)  # <s> a b </s> c d
    assert cut["tokens"].tolist() == text["tokens"][:6].tolist()
    assert cut["target_weights"].tolist() == [1, 1, 1, 1, 1, 0]
    image = draw_prompts([Prompt(("ab",)), Image(PIXELS, True)], rng, 0.0, end_of_prompt=True)
    assert not split_document(build_document(image, TOKENIZER, MODEL.layout), 8, TOKENIZER)


def test_an_image_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) is not \[h, w, 1\]"):
        build_document([Image(np.zeros((4, 4, 3)), True)], TOKENIZER, MODEL.layout)


def test_digits_are_split_by_label_and_kept_apart():
    train, test = digits("train"), digits("test")
    assert len(train[0]) == 1437 and len(test[0]) == 360
    assert np.bincount(test[1]).min() >= 34
    seen = {image.tobytes() for image in train[0]}
    assert not any(image.tobytes() in seen for image in test[0])
    assert train[0].min() == -1 and train[0].max() == 1


def test_the_beginning_of_a_sentence_decides_its_end():
    said = sentences()
    assert len(dict(said)) == len(said) == 190
    assert ("two plus three is", " five") in said
    assert ("count from nine to six:", " nine eight seven six") in said
    assert draw_prompt(8) == "draw an eight"


def test_unknown_sources_and_sizes_are_refused(change):
    with pytest.raises(InputError, match=r"mixture\.dance is not a source: choose from draw, read"):
        open_sources(change(data={"mixture": {"dance": 1.0}}).data, 1)
    with pytest.raises(
        InputError, match="image_size=12 is not a multiple of 8: the digits are 8×8"
    ):
        open_sources(change(data={"image_size": 12}).data, 1)
    with pytest.raises(InputError, match=r"vocab_size=200 is smaller than the tokenizer's 262"):
        Batches(change(model={"vocab_size": 200}), TOKENIZER)


def test_digits_are_enlarged_to_the_images_of_the_model(change):
    """Squares of one value in every channel; a shift moves whole squares; the way back is exact."""
    data = change(data={"image_size": 24, "shift_pixels": 1}).data
    draw = open_sources(data, 3)["draw"]
    _, first = draw.to_parts(draw.examples[0], None)
    image, label = digits("train")[0][0], digits("train")[1][0]
    assert first.pixels.shape == (24, 24, 3)
    for y, x in np.ndindex(8, 8):
        square = first.pixels[3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
        assert (square == image[y, x, 0]).all()
    np.testing.assert_allclose(reduce_images(first.pixels[None]), image[None], atol=1e-6)
    read = open_sources(data, 3)["read"]
    seen = {
        read.to_parts(read.examples[0], np.random.default_rng(n))[1].pixels[::3, ::3, 0].tobytes()
        for n in range(60)
    }
    padded = np.pad(image[..., 0], 1, constant_values=-1)
    assert seen == {padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert read.to_parts((image, label), np.random.default_rng(0))[2] == NAMES[label]


def take(config, n, **shard):
    batches = Batches(config, TOKENIZER, **shard)
    return [next(batches.iterator) for _ in range(n)], batches


def documents_of(batch):
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == number
            yield {name: stream[row][here] for name, stream in batch.items()}


def test_rows_follow_the_contract_and_documents_are_complete(config):
    made, _ = take(config, 12)
    expected = contract.spec(config.layout, config.batch_size, config.data.max_seq_len)
    real = {image.tobytes() for image in digits("train")[0]}
    kinds_of_documents = set()
    for batch in made:
        contract.check(batch, expected, config.max_images, config.layout.vocab_size)
        for document in documents_of(batch):
            tokens, token_types, targets = (
                document[k] for k in ("tokens", "token_types", "targets")
            )
            assert tokens[0] == TOKENIZER.bos_id and tokens[-1] == TOKENIZER.eos_id
            np.testing.assert_array_equal(document["positions"], np.arange(len(tokens)))
            np.testing.assert_array_equal(targets[:-1], tokens[1:])
            learned = np.append(token_types[1:] == TEXT, False)
            np.testing.assert_array_equal(document["target_weights"], learned)
            images = document["image_ids"][token_types == PATCH]
            assert len(images) in (0, 16) and len(set(images)) <= 1  # complete, or none
            if document["denoise"].any():
                pixels = contract.unpatchify(document["patches"][token_types == PATCH], 8, 8, 2)
                assert pixels.tobytes() in real
            kinds_of_documents.add(describe(tokens, token_types, TOKENIZER).split(" ")[0])
        for row in range(config.batch_size):
            ids = batch["image_ids"][row]
            assert sorted(set(ids[ids > 0])) == list(range(1, ids.max() + 1))
    assert {"draw", "read", "count", "<image"} <= kinds_of_documents


def test_the_mixture_is_that_of_the_config(change):
    weights = {"draw": 0.5, "read": 0.3, "say": 0.2}
    made, _ = take(change(data={"mixture": weights, "prompt_dropout": 0.25}), 40)
    counts = dict.fromkeys(weights, 0)
    dropped = 0
    for batch in made:
        for document in documents_of(batch):
            drawn = document["denoise"].any()
            kind = (
                "draw" if drawn else "read" if (document["token_types"] == PATCH).any() else "say"
            )
            counts[kind] += 1
            dropped += drawn and document["token_types"][2] == TIME  # <s> <|im_start|> TIME
    total = sum(counts.values())
    for name, weight in weights.items():
        assert counts[name] / total == pytest.approx(weight, abs=0.05)
    assert dropped / counts["draw"] == pytest.approx(0.25, abs=0.06)


def test_a_page_has_a_digit_and_the_next_to_generate(change):
    pixels, labels = digits("train")
    known = {image.tobytes(): digit for image, digit in zip(pixels, labels)}
    source = open_sources(change(data={"mixture": {"page": 1.0}}).data, 1)["page"]
    assert len(source.examples) == 1437
    for number, example in enumerate(source.examples[:100]):
        prompt, *images, names = source.to_parts(example, np.random.default_rng(number))
        assert prompt == Prompt(("a digit and the next: ",)) and all(x.denoise for x in images)
        first, second = (known[image.pixels.tobytes()] for image in images)
        assert second == (first + 1) % 10 and names == f"{NAMES[first]}, {NAMES[second]}"


def test_nearly_all_tokens_are_real(config):
    made, _ = take(config, 100)
    assert np.mean([batch["token_types"] > 0 for batch in made]) >= 0.98


def test_a_row_takes_the_oldest_document_and_those_that_fill_it_best():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 40, rng.integers(1, 10)).tolist()
        images = rng.integers(0, 3, len(lengths)).tolist()
        room, most = max(int(rng.integers(40, 120)), lengths[0]), int(rng.integers(2, 9))
        chosen = fill(lengths, room, images, most)
        sums = [
            lengths[0] + sum(lengths[i] for i in some)
            for count in range(len(lengths))
            for some in itertools.combinations(range(1, len(lengths)), count)
            if images[0] + sum(images[i] for i in some) <= most
        ]
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert sum(images[i] for i in chosen) <= most
        assert sum(lengths[i] for i in chosen) == max(x for x in sums if x <= room)
    assert fill([5, 3, 3, 3], 11, [0] * 4, 0) == [0, 1, 2]  # the older of equal ones


def test_a_row_has_at_most_max_images(change):
    """The U-Net's slots of a row; a document that has more is left out, and counted."""
    config = change(data={"max_images": 2, "mixture": {"draw": 1.0}})
    made, _ = take(config, 10)
    assert config.max_images == 2 and {int(batch["image_ids"].max()) for batch in made} == {2}
    pair = build_document([Image(PIXELS, True), Image(PIXELS, True)], TOKENIZER, MODEL.layout)
    assert not SplitToRows(100, TOKENIZER, 1).flat_map(pair)
    assert SplitToRows(100, TOKENIZER, 2).flat_map(pair) == [pair]


def test_every_document_is_packed_once_and_soon(change):
    """Documents of one text each, in the order in which they are read."""
    few = sources.Source(range(1000), lambda i, rng: [f"{i}:" + "x" * (i * 7 % 23)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "few", lambda c, _: few)
        data = {"mixture": {"few": 1.0}, "packing_buffer": 16, "max_seq_len": 64}
        made, _ = take(change(batch_size=1, data=data), 100)
        data = data | {"packing_buffer": 1}
        order, _ = take(change(batch_size=1, data=data), 600)
    order = {next(documents_of(batch))["tokens"].tobytes(): i for i, batch in enumerate(order)}
    places = [[order[d["tokens"].tobytes()] for d in documents_of(batch)] for batch in made]
    flat = [place for row in places for place in row]
    assert len(set(flat)) == len(flat) and len(places[0]) > 1 and flat != sorted(flat)
    tokenized = [build_document(["x" * n], TOKENIZER, MODEL.layout) for n in (3, 9, 4, 8)]
    finite = Pack(
        grain.MapDataset.source(tokenized).to_iter_dataset(), MODEL.layout, rows=2, length=12,
        buffer=3, pad_id=TOKENIZER.pad_id, max_images=1,
    )  # fmt: skip
    assert [(b["token_types"] > 0).sum(1).tolist() for b in finite] == [[11, 11], [10, 0]]
    done = set()
    for row in places:
        oldest = next(i for i in itertools.count() if i not in done)
        assert oldest in row  # so that no document is left behind
        done |= set(row)


def same(a, b):
    return all((x[name] == y[name]).all() for x, y in zip(a, b) for name in x)


def test_the_pipeline_is_deterministic_and_resumes(change):
    config = change(data={"packing_buffer": 4})
    first, _ = take(config, 9)
    again, batches = take(config, 4)
    state = batches.iterator.get_state()
    assert same(first, again)
    other = Batches(config, TOKENIZER)
    other.iterator.set_state(state)
    assert same(first[4:], [next(other.iterator) for _ in range(5)])
    assert not same(first, take(change(seed=1), 9)[0])


def test_rows_do_not_depend_on_the_number_of_processes(change):
    """Any split of the rows over processes, also within a stream, yields the same global batches; any
    process can resume a stream."""
    config = change(data={"streams": 2, "packing_buffer": 4})
    whole, batches = take(config, 5)
    state = batches.iterator.get_state()
    later = [next(batches.iterator) for _ in range(3)]
    for split in ([[0], [1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        for rows in split:
            part, _ = take(config, 5, rows=rows)
            assert same(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])
    half = Batches(config, TOKENIZER, rows=[2, 3])
    assert list(half.iterator.get_state()) == ["1"]
    half.iterator.set_state(state)
    assert same([next(half.iterator) for _ in range(3)],
                [{k: v[2:] for k, v in batch.items()} for batch in later])  # fmt: skip


def test_streams_partition_every_epoch(change):
    """Two streams together read each of the 190 sentences once per epoch."""
    config = change(data={"streams": 2, "mixture": {"say": 1.0}, "packing_buffer": 1})
    made, _ = take(config, 50)
    seen = [[], []]
    for batch in made:
        for row in range(4):
            halves = {name: stream[row : row + 1] for name, stream in batch.items()}
            seen[row // 2] += [d["tokens"].tobytes() for d in documents_of(halves)]
    assert min(map(len, seen)) > 95
    first = [set(documents[:95]) for documents in seen]
    assert len(first[0]) == len(first[1]) == 95 and not first[0] & first[1]


def test_fewer_examples_than_streams_are_read_equally_often(change):
    """Ten streams of five sentences: their first documents together are two epochs."""
    data = {"streams": 10, "mixture": {"few": 1.0}, "packing_buffer": 1, "max_seq_len": 21}
    few = sources.Source([letter * 17 for letter in "abcde"], lambda text, rng: [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "few", lambda c, _: few)
        made, _ = take(change(batch_size=10, data=data), 3)
    for batch in made:  # one document a row
        texts, counts = np.unique(batch["tokens"], axis=0, return_counts=True)
        assert len(texts) == 5 and (counts == 2).all()


def test_the_default_streams_depend_on_the_batch_alone(change):
    sizes = {1: 1, 2: 1, 12: 1, 16: 4, 64: 16, 96: 8, 256: 64, 1024: 64}
    assert {size: change(batch_size=size).streams for size in sizes} == sizes
    config = change(batch_size=96)
    assert config.to_dict()["data"]["streams"] == 0  # so that a copied config fits another batch
    check_streams(config, 8)
    with pytest.raises(InputError, match=r"9 hosts share data.streams=8 of batch_size=96: set "
                                         r"--config.data.streams=12 in a new workdir"):  # fmt: skip
        check_streams(config, 9)
    with pytest.raises(InputError, match=r"streams=2 of batch_size=12: set .*streams=3 in"):
        check_streams(change(batch_size=12, data={"streams": 2}), 3)
    with pytest.raises(InputError, match="raise batch_size to 97"):
        check_streams(config, 97)


def test_worker_processes_make_the_same_batches_and_resume(change):
    """None, two workers for three streams, and none, each from the state of the one before."""
    config = change(batch_size=6, data={"streams": 3, "packing_buffer": 4, "max_seq_len": 64})
    want, _ = take(config, 9)
    got, state = [], None
    for workers in (0, 2, 0):
        batches = Batches(config, TOKENIZER, workers=workers)
        with contextlib.closing(batches.iterator):
            if state is not None:
                batches.iterator.set_state(state)
            got += [next(batches.iterator) for _ in range(3)]
            state = json.loads(json.dumps(batches.iterator.get_state()))
            assert batches.skipped["cut"] > 0
    assert same(got, want)


def test_documents_that_are_too_long_are_dropped_and_counted(change):
    """Rows of 31 tokens hold an image but not the draw prompt with it; sentences are cut."""
    mixture = {"draw": 0.5, "say": 0.5}
    made, batches = take(change(data={"max_seq_len": 31, "mixture": mixture}), 12)
    found = [d for b in made for d in documents_of(b)]
    assert batches.skipped["too_long"] > 0 and batches.skipped["cut"] > 0
    assert all((d["token_types"] == PATCH).sum() in (0, 16) for d in found)
    whole = [d["tokens"][-1] == TOKENIZER.eos_id for d in found]
    assert any(whole) and all(w or len(d["tokens"]) == 31 for w, d in zip(whole, found))


def test_more_images_than_max_images_are_refused(change):
    """Images smaller than data.image_size: two documents of 8 share no row, one of 10 fits none."""

    def tiny(count):
        return lambda c, channels: sources.Source(
            range(9), lambda i, rng: [Image(np.zeros((2, 2, 1)), True)] * count
        )

    config = change(data={"mixture": {"tiny": 1.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "tiny", tiny(8))
        made, _ = take(config, 1)
        assert config.max_images == 9 and (made[0]["image_ids"].max(1) == 8).all()
        patch.setitem(sources.SOURCES, "tiny", tiny(10))
        with pytest.raises(InputError, match=r"a document has 10 images, but .* allow 9 in a row"):
            take(config, 1)


def test_every_turn_of_a_long_chat_is_in_some_row_and_a_resumed_run_repeats_none(change):
    """Chats of 26 turns are two or three rows each; a state may lie between two pieces of one chat."""
    chats = [
        [p for y in map(chr, range(97, 123)) for p in turn(f"{x}{y}?", f"{y}{x}.")][:-1]
        for x in "abc"
    ]
    source = sources.Source(chats, lambda parts, rng: parts)
    data = {"mixture": {"chats": 1.0}, "packing_buffer": 2, "max_seq_len": 90}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "chats", lambda c, _: source)
        made, batches = take(change(data=data), 9)
        for step in (1, 2, 3):
            state = take(change(data=data), step)[1].iterator.get_state()
            resumed = Batches(change(data=data), TOKENIZER)
            resumed.iterator.set_state(json.loads(json.dumps(state)))
            assert same(made[step:], [next(resumed.iterator) for _ in range(9 - step)])
    assert set(batches.skipped) == {"cut"}
    said = "".join(TOKENIZER.decode(d["tokens"].tolist()) for b in made for d in documents_of(b))
    assert all(f"{x}{y}?{y}{x}." in said for x in "abc" for y in map(chr, range(97, 123)))


def test_documents_that_are_all_too_long_raise_an_error(change):
    data = {"max_seq_len": 21, "mixture": {"read": 1.0}}
    with pytest.raises(InputError, match=r"none of the first 1000 documents fits.*max_seq_len=21"):
        take(change(data=data), 1)
