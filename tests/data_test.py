"""Documents, packing and the pipeline: nothing is lost, cut, mixed up or drawn in another order."""

import numpy as np
import pytest

from monoformer_jax import batch as contract
from monoformer_jax.batch import PATCH, TEXT, TIME
from monoformer_jax.config import ModelConfig, named_size
from monoformer_jax.data.digits import digits, draw_prompt, sentences
from monoformer_jax.data.documents import Image, build, describe, truncate
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.sources import open_sources
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(**named_size("tiny"))
PIXELS = np.arange(16, dtype=np.float32).reshape(4, 4, 1) / 16


def test_bytes_come_back_and_a_special_name_is_only_text():
    for text in ("draw a one", "naïve — 数字", "<|im_start|></s>", ""):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert all(6 <= i < TOKENIZER.vocab_size for i in ids)


def test_streams_of_a_document():
    document = build(["ab", Image(PIXELS, denoise=True), "c"], TOKENIZER, MODEL)
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
    painted = build(["a", Image(PIXELS, True)], TOKENIZER, MODEL, text_beside_images=False)
    shown = build(["a", Image(PIXELS, False)], TOKENIZER, MODEL, text_beside_images=False)
    assert painted["target_weights"].sum() == 0 and shown["target_weights"].sum() == 4


def test_text_is_cut_and_an_image_never():
    text = build(["abcdef"], TOKENIZER, MODEL)
    cut = truncate(text, 4)
    assert len(cut["tokens"]) == 4 and cut["target_weights"].tolist() == [1, 1, 1, 0]
    assert len(text["tokens"]) == 8 and truncate(text, 8) is text
    image = build([Image(PIXELS, True)], TOKENIZER, MODEL)
    assert truncate(image, 4) is image


def test_an_image_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) is not \[h, w, 1\]"):
        build([Image(np.zeros((4, 4, 3)), True)], TOKENIZER, MODEL)


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
    with pytest.raises(InputError, match=r"mixture\.dance is no source; there are draw, read, say"):
        open_sources(change(data={"mixture": {"dance": 1.0}}).data)
    with pytest.raises(InputError, match="image_size=16, but the digits are 8×8"):
        open_sources(change(data={"image_size": 16}).data)
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


def test_rows_keep_the_contract_and_documents_stay_whole(config):
    made, _ = take(config, 12)
    expected = contract.spec(config)
    real = {image.tobytes() for image in digits("train")[0]}
    kinds_of_documents = set()
    for batch in made:
        contract.check(batch, expected, config.max_images)
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
            assert len(images) in (0, 16) and len(set(images)) <= 1  # whole, or none
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


def test_the_stream_is_deterministic_and_resumes_where_it_was(change):
    config = change(data={"packing_bins": 4})
    first, _ = take(config, 9)
    again, batches = take(config, 4)
    state = batches.iterator.get_state()
    assert same(first, again)
    other = Batches(config, TOKENIZER)
    other.iterator.set_state(state)
    assert same(first[4:], [next(other.iterator) for _ in range(5)])
    assert not same(first, take(change(seed=1), 9)[0])


def test_the_rows_do_not_depend_on_who_packs_them(change):
    """Any split of the rows over processes, also one that cuts a stream, gives the same global batches;
    the state of a stream goes on in whichever process runs it next."""
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


def test_streams_share_every_epoch_out_between_them(change):
    """Two streams of sums and counts: together they read each of the 190 sentences once, then again."""
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


def test_more_streams_than_examples_are_refused(change):
    with pytest.raises(InputError, match=r"data.streams=200, but source say has only 190 examples"):
        Batches(change(batch_size=200, data={"streams": 200}), TOKENIZER)


def test_documents_that_are_too_long_are_dropped_and_counted(change):
    """A row of 32 holds an image and little else: the drawn digits with a prompt do not fit."""
    mixture = {"draw": 0.5, "say": 0.5}
    made, batches = take(change(data={"max_seq_len": 31, "mixture": mixture}), 12)
    found = [d for b in made for d in documents_of(b)]
    assert batches.dropped > 0
    assert all((d["token_types"] == PATCH).sum() in (0, 16) for d in found)
    assert all(d["tokens"][-1] == TOKENIZER.eos_id for d in found)


def test_small_images_that_outnumber_the_rows_room_are_refused(change):
    """A source may bring smaller images than data.image_size; more of them fit than are counted."""
    from monoformer_jax.data import sources

    def tiny(c):
        return sources.Source(range(9), lambda i, rng: [Image(np.zeros((2, 2, 1)), True)] * 8)

    config = change(data={"mixture": {"tiny": 1.0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "tiny", tiny)
        with pytest.raises(InputError, match=r"images came into one row, .* make room for 9"):
            take(config, 1)


def test_text_is_truncated_only_where_the_config_says_so(change):
    data = {"max_seq_len": 24, "mixture": {"say": 1.0}, "truncate_text": True}
    made, batches = take(change(data=data), 12)
    ends = [d["tokens"][-1] for b in made for d in documents_of(b)]
    assert batches.dropped == 0
    assert TOKENIZER.eos_id in ends and any(end != TOKENIZER.eos_id for end in ends)


def test_rows_that_no_document_fits_are_an_error_and_not_an_endless_search(change):
    data = {"max_seq_len": 21, "mixture": {"read": 1.0}}
    with pytest.raises(InputError, match=r"none of the first 1000 documents fits.*max_seq_len=21"):
        take(change(data=data), 1)
