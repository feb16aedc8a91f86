"""Cases in which every attention implementation is compared with the float32 dense reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from monoformer_jax.attention import IntervalMask, dense_attention, interval_mask, merge
from monoformer_jax.batch import PAD, PATCH, TEXT, TIME

LENGTH = 300  # not a multiple of any block size


def row(*documents, length):
    """Streams of one row; in a document 0 is a text token and n > 0 an image of n patches."""
    token_types, segments, images, image = [], [], [], 0
    for number, document in enumerate(documents, 1):
        for part in document:
            new = [TEXT] if part == 0 else [TIME] + [PATCH] * part
            image += part > 0
            token_types += new
            segments += [number] * len(new)
            images += [image if part else 0] * len(new)
    pad = length - len(token_types)
    streams = (token_types + [PAD] * pad, segments + [0] * pad, images + [0] * pad)
    return tuple(np.array([s], np.int32) for s in streams)


ROWS = {
    "text": row([0] * LENGTH, length=LENGTH),
    "packed, image last": row([0] * 30 + [64], [0] * 70 + [130], length=LENGTH),
    "several images": row([0, 100, 0, 0, 90] + [0] * 40, [0, 16, 16], length=LENGTH),
    "image first": row([150] + [0] * 20, [60, 0], length=LENGTH),
    "one-token documents": row(*[[0]] * 140, [0, 120], *[[0]] * 20, length=LENGTH),
    "nothing but padding": row(length=LENGTH),
}


def all_rows() -> IntervalMask:
    """All `ROWS` as one batch, and one more row of random ranges, which are not monotone."""
    masks = [interval_mask(*streams) for streams in ROWS.values()]
    ends = np.sort(np.random.default_rng(0).integers(0, LENGTH + 1, (2, 1, LENGTH)), axis=0)
    masks.append(IntervalMask(*jnp.asarray(ends, jnp.int32)))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *masks)


EVERY_ROW = tuple(range(len(ROWS) + 1))
SOME_ROWS = (1, 2, len(ROWS))  # packed, several images, random ranges: a row costs seconds


def last_queries(mask: IntervalMask, count: int) -> IntervalMask:
    """The mask of the last `count` queries over all keys, as in decoding."""
    return jax.tree.map(lambda x: x[:, -count:], mask)


def split(mask: IntervalMask) -> tuple[IntervalMask, IntervalMask]:
    """Splits each range into two that are one key apart; short ranges leave one or both empty."""
    middle = (mask.start + mask.stop) // 2
    hole = jnp.minimum(middle + 1, mask.stop)
    return IntervalMask(mask.start, middle), IntervalMask(hole, mask.stop)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call: number of (last) queries, heads, one mask or a union of two, rows."""

    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 64
    queries: int = LENGTH
    union: bool = False
    dtype: str = "float32"
    rows: tuple[int, ...] = SOME_ROWS

    def masks(self) -> tuple[IntervalMask, ...]:
        """One mask, or the two of a union."""
        mask = jax.tree.map(lambda x: x[jnp.array(self.rows)], all_rows())
        mask = last_queries(mask, self.queries)
        return split(mask) if self.union else (mask,)

    def qkv(self) -> list[jax.Array]:
        """q [B, L, N, H], k and v [B, S, K, H]."""
        batch, heads = len(EVERY_ROW), self.kv_heads * self.groups
        shapes = [
            (batch, self.queries, heads, self.head_dim),
            *[(batch, LENGTH, self.kv_heads, self.head_dim)] * 2,
        ]
        keys = jax.random.split(jax.random.key(0), 3)
        drawn = [jax.random.normal(key, s, self.dtype) for key, s in zip(keys, shapes)]
        return [x[jnp.array(self.rows)] for x in drawn]


CASES = {
    "groups of 1, pair of heads": Case(kv_heads=2, rows=EVERY_ROW),
    "groups of 4": Case(groups=4, head_dim=128),
    "groups of 8": Case(groups=8),
    "odd heads of 64": Case(kv_heads=3, groups=2),
    "head dim 256": Case(head_dim=256),
    "decode": Case(kv_heads=2, queries=1, rows=EVERY_ROW),
    "denoise behind a cached prefix": Case(groups=2, queries=130),
    "union": Case(groups=2, head_dim=128, union=True),
    "bfloat16": Case(kv_heads=2, groups=2, dtype="bfloat16"),
}
# Limits of `errors`: output and gradients.
LIMITS = {"float32": (2e-6, 2e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-2, 1e-2)}


def loss_and_results(run, masks):
    """A scalar loss of every output and log-sum-exp, both of these, and the gradients."""

    def loss(q, k, v):
        parts = [run(q, k, v, mask) for mask in masks]
        out = parts[0][0] if len(parts) == 1 else merge(parts)
        weight = jax.random.normal(jax.random.key(1), out.shape)
        total = (weight * out.astype(jnp.float32)).sum()
        for mask, (_, lse) in zip(masks, parts):
            seen = (mask.start < mask.stop)[..., None]
            total += (jnp.where(seen, lse, 0.0) * weight[..., 0]).sum()
        return total, (out, [lse for _, lse in parts])

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def errors(case: Case, run, jit=jax.jit) -> dict[str, float]:
    """Largest errors of `run`: absolute for float32, else relative to the largest value, or to 1."""
    qkv, masks = case.qkv(), case.masks()
    (_, (out, lses)), grads = jit(loss_and_results(run, masks))(*qkv)
    exact = [x.astype(jnp.float32) for x in qkv]
    with jax.default_matmul_precision("highest"):
        oracle = jax.jit(loss_and_results(dense_attention, masks))
        (_, (want_out, want_lses)), want_grads = oracle(*exact)
    got = {"out": out, **{f"lse {i}": x for i, x in enumerate(lses)}}
    want = {"out": want_out, **{f"lse {i}": x for i, x in enumerate(want_lses)}}
    got |= dict(zip(("dq", "dk", "dv"), grads))
    want |= dict(zip(("dq", "dk", "dv"), want_grads))
    found = {}
    for name, x in got.items():
        x, y = np.asarray(x, np.float64), np.asarray(want[name], np.float64)
        assert x.shape == y.shape and np.isfinite(x).all(), name
        scale = 1.0 if case.dtype == "float32" else max(np.abs(y[y > -1e29]).max(initial=0), 1.0)
        found[name] = float(np.abs(x - y).max() / scale)
    return found


def assert_within_limits(case: Case, found: dict[str, float]) -> None:
    """Fails with all errors if one is too large."""
    out_limit, grad_limit = LIMITS[case.dtype]
    limits = {name: grad_limit if name in ("dq", "dk", "dv") else out_limit for name in found}
    too_large = {name: x for name, x in found.items() if not x <= limits[name]}
    assert not too_large, f"{too_large} of {found}"
