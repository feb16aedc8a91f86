"""Documents, packing and the data pipeline: no lost or split documents, deterministic order."""

import contextlib
import json

import numpy as np
import pytest

from monoformer_jax import batch as contract
from monoformer_jax.batch import PATCH, TEXT, TIME
from monoformer_jax.data import sources
from monoformer_jax.data.digits import digits, draw_prompt, sentences
from monoformer_jax.data.documents import Image, build_document, describe, truncate
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


def test_text_is_truncated_and_images_are_not():
    text = build_document(["abcdef"], TOKENIZER, MODEL.layout)
    cut = truncate(text, 4)
    assert len(cut["tokens"]) == 4 and cut["target_weights"].tolist() == [1, 1, 1, 0]
    assert len(text["tokens"]) == 8 and truncate(text, 8) is text
    image = build_document([Image(PIXELS, True)], TOKENIZER, MODEL.layout)
    assert truncate(image, 4) is image


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
    with pytest.raises(InputError, match="image_size=16, but the digits are 8×8"):
        open_sources(change(data={"image_size": 16}).data, 1)
    with pytest.raises(InputError, match=r"vocab_size=200 is smaller than the tokenizer's 262"):
        Batches(change(model={"vocab_size": 200}), TOKENIZER)


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


def test_nine_tenths_of_the_tokens_are_real(config):
    made, _ = take(config, 100)
    assert np.mean([batch["token_types"] > 0 for batch in made]) >= 0.9


def same(a, b):
    return all((x[name] == y[name]).all() for x, y in zip(a, b) for name in x)


def test_the_pipeline_is_deterministic_and_resumes(change):
    config = change(data={"packing_bins": 4})
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
    config = change(data={"streams": 2, "packing_bins": 4})
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
    config = change(data={"streams": 2, "mixture": {"say": 1.0}, "packing_bins": 1})
    made, _ = take(config, 40)
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
    data = {"streams": 10, "mixture": {"few": 1.0}, "packing_bins": 1, "max_seq_len": 21}
    few = sources.Source([letter * 17 for letter in "abcde"], lambda text, rng: [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "few", lambda c: few)
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
    config = change(batch_size=6, data={"streams": 3, "packing_bins": 4, "max_seq_len": 64})
    want, _ = take(config, 9)
    got, state = [], None
    for workers in (0, 2, 0):
        batches = Batches(config, TOKENIZER, workers=workers)
        with contextlib.closing(batches.iterator):
            if state is not None:
                batches.iterator.set_state(state)
            got += [next(batches.iterator) for _ in range(3)]
            state = json.loads(json.dumps(batches.iterator.get_state()))
            assert batches.skipped["too_long"] > 0
    assert same(got, want)


def test_documents_that_are_too_long_are_dropped_and_counted(change):
    """Rows of 32 tokens hold an image but not the draw prompt with it."""
    mixture = {"draw": 0.5, "say": 0.5}
    made, batches = take(change(data={"max_seq_len": 31, "mixture": mixture}), 12)
    found = [d for b in made for d in documents_of(b)]
    assert batches.skipped["too_long"] > 0
    assert all((d["token_types"] == PATCH).sum() in (0, 16) for d in found)
    assert all(d["tokens"][-1] == TOKENIZER.eos_id for d in found)


def test_more_images_than_max_images_are_refused(change):
    """Images smaller than data.image_size can exceed max_images in a row."""

    def tiny(c):
        return sources.Source(range(9), lambda i, rng: [Image(np.zeros((2, 2, 1)), True)] * 8)

    config = change(data={"mixture": {"tiny": 1.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "tiny", tiny)
        with pytest.raises(InputError, match=r"images are packed in one row, .* allow 9"):
            take(config, 1)


def test_text_is_truncated_only_where_the_config_says_so(change):
    data = {"max_seq_len": 24, "mixture": {"say": 1.0}, "truncate_text": True}
    made, batches = take(change(data=data), 12)
    ends = [d["tokens"][-1] for b in made for d in documents_of(b)]
    assert batches.skipped["too_long"] == 0
    assert TOKENIZER.eos_id in ends and any(end != TOKENIZER.eos_id for end in ends)


def test_documents_that_are_all_too_long_raise_an_error(change):
    data = {"max_seq_len": 21, "mixture": {"read": 1.0}}
    with pytest.raises(InputError, match=r"none of the first 1000 documents fits.*max_seq_len=21"):
        take(change(data=data), 1)
