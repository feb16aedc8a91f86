"""The batch contract: patches, and the errors of `check`."""

import numpy as np
import pytest

from monoformer_jax import batch as contract
from monoformer_jax.batch import PAD, PATCH, TEXT, TIME
from monoformer_jax.config import TokenLayout


def test_patches_are_in_the_order_channel_row_column():
    image = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)  # 2 high, 4 wide, 3 channels
    patches, patch_positions = contract.patchify(image, 2)
    want = [
        [image[h, 2 * j + w, c] for c in range(3) for h in range(2) for w in range(2)]
        for j in (0, 1)
    ]
    np.testing.assert_array_equal(patches, want)
    np.testing.assert_array_equal(patch_positions, [[0, 0], [0, 1]])


def test_unpatchify_inverts_patchify_of_a_non_square_image():
    image = np.random.default_rng(0).normal(size=(6, 4, 2)).astype(np.float32)
    patches, patch_positions = contract.patchify(image, 2)
    assert patch_positions[-1].tolist() == [2, 1]
    np.testing.assert_array_equal(contract.unpatchify(patches, 6, 4, 2), image)


def test_an_image_not_divisible_by_the_patch_size_is_refused():
    with pytest.raises(ValueError, match="7×4 cannot be split into patches of size 2"):
        contract.patchify(np.zeros((7, 4, 1)), 2)


LAYOUT = TokenLayout(vocab_size=262, channels=1, patch_size=2)
SPEC = contract.spec(LAYOUT, 1, 6)


def good_batch():
    batch = {k: np.zeros(s.shape, s.dtype) for k, s in SPEC.items()}
    batch["token_types"][0] = [TEXT, TIME, PATCH, PATCH, TEXT, PAD]
    batch["segment_ids"][0] = [1, 1, 1, 1, 1, 0]
    batch["image_ids"][0] = [0, 1, 1, 1, 0, 0]
    return batch


def test_check_accepts_a_good_batch():
    contract.check(good_batch(), SPEC, max_images=1, vocab_size=262)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("token_types", 4, "row 0, token 5: token_types"),
        ("segment_ids", 2, "token 5: segment_ids"),
        ("image_ids", 1, "token 5: image_ids: must be above 0"),
        ("denoise", True, "token 5: denoise"),
        ("patches", 1.0, "token 5: patches"),
        ("target_weights", 1.0, "token 5: target_weights"),
        ("tokens", 262, "row 0, token 5: tokens is 262, but ids of this"),
        ("targets", -1, "row 0, token 5: targets is -1, but ids of this"),
    ],
)
def test_check_names_the_row_the_token_and_the_rule(field, value, message):
    batch = good_batch()
    batch[field][0, 5] = value
    with pytest.raises(ValueError, match=message):
        contract.check(batch, SPEC, max_images=1, vocab_size=262)


def test_check_counts_images_and_compares_shapes():
    with pytest.raises(ValueError, match="more than 0 images"):
        contract.check(good_batch(), SPEC, max_images=0, vocab_size=262)
    with pytest.raises(ValueError, match=r"tokens is int32\[1, 6\], expected int32\[2, 6\]"):
        contract.check(good_batch(), contract.spec(LAYOUT, 2, 6), max_images=1, vocab_size=262)
    batch = good_batch()
    del batch["patch_positions"]
    with pytest.raises(ValueError, match="missing or unknown: patch_positions"):
        contract.check(batch, SPEC, max_images=1, vocab_size=262)
