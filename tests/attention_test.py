"""The mask against its docstring, dense attention against softmax, and kernels against dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, all_rows, assert_within_limits, errors, row, split
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import monoformer_jax.attention as attention_module
from monoformer_jax.attention import (
    IntervalMask,
    check_mask,
    choose,
    dense_mask,
    interval_attention,
    interval_mask,
    mask,
    mask_area,
    merge,
)
from monoformer_jax.attention.dense import EMPTY_LSE, dense_attention
from monoformer_jax.attention.tpu_kernel import Plan, fit, tpu_attention
from monoformer_jax.batch import PATCH

# Several blocks and chunks per row, to cover every loop and every chunk boundary.
SMALL = Plan(
    queries=128, keys=128, wide=128, chunk_keys=256, chunk_queries=256, vmem_limit=0
)  # fmt: skip
interpreted = functools.partial(tpu_attention, chip="TPU v5e", plan=SMALL, interpret=True)


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """The error limits are for optimized programs; conftest disables most XLA optimizations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


ROWS = {
    "docstring": row([0, 0, 0, 3, 0, 0], [0, 0], length=12),
    "several images": row([0, 3, 1, 0], [1], [0], length=12),
    "image last, no padding": row([0, 0], [0, 0, 7], length=12),
    "one-token documents": row([0], [0], [0, 1], [0], length=12),
    "nothing but padding": row(length=12),
}


def by_definition(token_types, segments, images):
    """Causal or same image, within a document; defined per (query, key) pair, without intervals."""
    token_types, segments, images = (np.asarray(x)[0] for x in (token_types, segments, images))
    n = len(token_types)
    allowed = np.zeros((n, n), bool)
    for q in range(n):
        for k in range(n):
            same = token_types[q] == token_types[k] == PATCH and images[q] == images[k]
            allowed[q, k] = segments[q] == segments[k] > 0 and (k <= q or same)
    return allowed


def assert_monotone(got):
    assert (np.diff(got.start) >= 0).all() and (np.diff(got.stop) >= 0).all()


def test_mask_matches_its_docstring():
    lines = [line.split() for line in mask.__doc__.splitlines()]
    lines = [line for line in lines if len(line) == 15 and set(line[1:13]) <= {"1", "."}]
    drawn = np.array([[c == "1" for c in line[1:13]] for line in lines])
    ends = np.array([[int(c) for c in line[13:]] for line in lines])
    assert drawn.shape == (12, 12)
    got = interval_mask(*ROWS["docstring"])
    np.testing.assert_array_equal(dense_mask(got, 12)[0], drawn)
    np.testing.assert_array_equal(jnp.stack([got.start[0], got.stop[0]], 1), ends)


@pytest.mark.parametrize("name", ROWS)
def test_mask_is_causal_or_same_image(name):
    got = interval_mask(*ROWS[name])
    np.testing.assert_array_equal(dense_mask(got, 12)[0], by_definition(*ROWS[name]))
    assert_monotone(got)


def test_mask_with_padding_on_the_left():
    """The library pads on the right; `interval_mask` accepts PAD on either side."""
    streams = [np.roll(s, 5, axis=1) for s in row([0, 0, 3, 0], length=12)]
    got = interval_mask(*streams)
    np.testing.assert_array_equal(dense_mask(got, 12)[0], by_definition(*streams))
    assert_monotone(got)


def random_qkv(length, keys, heads, kv_heads, head_dim=8, dtype=jnp.float32):
    keys_ = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, heads, head_dim), *[(1, keys, kv_heads, head_dim)] * 2]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys_, shapes)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ROWS)
def test_dense_attention_is_softmax_over_the_allowed_keys(name, groups):
    got_mask = interval_mask(*ROWS[name])
    length = got_mask.start.shape[1]
    q, k, v = random_qkv(length, length, 4, 4 // groups)
    out, lse = map(np.asarray, jax.jit(dense_attention)(q, k, v, got_mask))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    allowed = by_definition(*ROWS[name])
    for n in range(4):
        scores = q[0, :, n] @ k[0, :, n // groups].T
        scores /= np.sqrt(8)
        for l in range(length):
            seen = np.flatnonzero(allowed[l])
            if not len(seen):
                assert (out[0, l, n] == 0).all() and lse[0, l, n] == np.float32(EMPTY_LSE)
                continue
            weights = np.exp(scores[l, seen])
            want = weights @ v[0, seen, n // groups] / weights.sum()
            np.testing.assert_allclose(out[0, l, n], want, atol=2e-6)
            np.testing.assert_allclose(lse[0, l, n], np.log(weights.sum()), atol=2e-6)


def test_empty_range_has_no_gradient():
    q, k, v = random_qkv(6, 6, 2, 2)
    empty = IntervalMask(jnp.full((1, 6), 3, jnp.int32), jnp.full((1, 6), 3, jnp.int32))

    def loss(q, k, v):
        out, lse = dense_attention(q, k, v, empty)
        return (out**2).sum() + out.sum() + (lse * 1e-30).sum()

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        np.testing.assert_array_equal(gradient, 0)


def test_incompatible_arguments_raise():
    q, k, v = random_qkv(4, 4, 4, 3)
    fits = IntervalMask(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        interval_attention(q, k, v, fits)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        interval_attention(q, q, q, fits, impl="flash")
    with pytest.raises(ValueError, match=r"mask start .* do not match q"):
        interval_attention(q, q, q, IntervalMask(fits.start[:, :2], fits.stop[:, :2]))


FAST = ("groups of 1, pair of heads", "decode")


@pytest.mark.parametrize("name", [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES
])  # fmt: skip
def test_tpu_kernels_agree_with_dense_attention(name):
    """Output, log-sum-exp, dq, dk and dv; the loss depends on output and log-sum-exp."""
    assert_within_limits(CASES[name], errors(CASES[name], interpreted))


@pytest.mark.slow
def test_dense_attention_in_bfloat16_agrees_with_float32():
    assert_within_limits(CASES["bfloat16"], errors(CASES["bfloat16"], dense_attention))


@pytest.mark.slow
def test_default_plan_agrees_with_dense_attention():
    """In bfloat16, with rows long enough to cover every loop of the default plan."""
    length, (kv_heads, groups, head_dim) = 2048, (1, 4, 128)
    part = interval_mask(*row([0] * 40, [0] * 60 + [1024, 0, 256], [0] * 30, length=1536))
    causal = jnp.arange(1536, length, dtype=jnp.int32)[None]
    whole = IntervalMask(
        jnp.concatenate([part.start, jnp.zeros_like(causal)], 1),
        jnp.concatenate([part.stop, causal + 1], 1),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, length, kv_heads * groups, head_dim), *[(1, length, kv_heads, head_dim)] * 2]
    q, k, v = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes))
    weight = jax.random.normal(keys[3], shapes[0])

    def results(run, *qkv):
        out, back = jax.vjp(lambda *x: run(*x, whole)[0].astype(jnp.float32), *qkv)
        return out, *back(weight)

    default = functools.partial(tpu_attention, chip="TPU v6 lite", interpret=True)
    got = jax.jit(functools.partial(results, default))(q, k, v)
    want = jax.jit(functools.partial(results, dense_attention))(*map(jnp.float32, (q, k, v)))
    for x, y in zip(got, want):
        assert float(jnp.abs(x - y).max()) <= 1e-2 * float(jnp.abs(y).max())


@pytest.mark.slow
def test_edge_blocks_on_both_sides_of_full_blocks_are_visited():
    """The last query block and the first key block each visit an edge, two full blocks and an edge."""
    at = jnp.arange(512, dtype=jnp.int32)[None]
    mask_ = IntervalMask(jnp.where(at < 384, 0, 100), at + 1)
    q, k, v = random_qkv(512, 512, 1, 1, head_dim=128)
    q, k, v = (x[:1] for x in (q, k, v))
    plan = Plan(128, 128, 128, 512, 512, 0)
    run = functools.partial(tpu_attention, chip="TPU v5e", plan=plan, interpret=True)

    def results(attention):
        out, back = jax.vjp(lambda *x: attention(*x, mask_)[0], q, k, v)
        return out, *back(jnp.cos(out))

    for got, expected in zip(jax.jit(lambda: results(run))(), results(dense_attention)):
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)


def test_tpu_kernels_have_no_races():
    """Pallas' TPU interpreter detects races and initializes memory with NaN."""
    mask_ = jax.tree.map(lambda x: x[1:2], all_rows())
    q, k, v = random_qkv(300, 300, 2, 1, head_dim=128)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    run = functools.partial(tpu_attention, chip="TPU v5e", plan=SMALL, interpret=params)

    def loss(q, k, v):
        return (run(q, k, v, mask_)[0] ** 2).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    want = jax.grad(lambda *x: (dense_attention(*x, mask_)[0] ** 2).sum(), argnums=(0, 1, 2))
    for got, expected in zip(grads, want(q, k, v)):
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def test_union_attends_to_all_its_keys():
    """Two ranges merged by log-sum-exp equal the softmax over both with a dense mask."""
    first = jax.tree.map(lambda x: x[:2], all_rows())
    one, two = split(first)
    q, k, v = random_qkv(300, 300, 2, 2)
    q, k, v = (jnp.concatenate([x, -x]) for x in (q, k, v))
    allowed = dense_mask(one, 300) | dense_mask(two, 300)
    scores = jnp.einsum("BLNH,BSNH->BNLS", q, k, precision="highest") * 8**-0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), axis=-1)
    weights = jnp.where(allowed[:, None], weights, 0.0)
    want = jnp.einsum("BNLS,BSNH->BLNH", weights, v, precision="highest")
    np.testing.assert_allclose(interval_attention(q, k, v, (one, two)), want, atol=2e-6)
    merged = merge([dense_attention(q, k, v, part) for part in (one, two)])
    np.testing.assert_allclose(merged, want, atol=2e-6)


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (4, 20), (60, 4), (300, 300), (20, 60)])
def test_block_bounds_cover_every_visible_pair(block_q, block_k):
    """No visible block is skipped, full blocks are fully visible; exact for monotone rows."""
    rows = all_rows()
    length = rows.start.shape[1]
    by_query = mask.key_block_bounds(rows, block_q, block_k)
    by_key = mask.query_block_bounds(by_query, length // block_k)
    seen = np.asarray(dense_mask(rows, length))
    blocks = seen.reshape(len(seen), length // block_q, block_q, length // block_k, block_k)
    some, every = blocks.any((2, 4)), blocks.all((2, 4))
    for bounds, axes in [(by_query, (0, 1, 2)), (by_key, (0, 2, 1))]:
        any_seen, all_seen = some.transpose(axes), every.transpose(axes)
        lo, full_lo, full_hi, hi = (np.asarray(x)[..., None] for x in bounds)
        assert ((lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi)).all()
        other = np.arange(any_seen.shape[2])
        inside, full = (lo <= other) & (other < hi), (full_lo <= other) & (other < full_hi)
        assert inside[any_seen].all() and all_seen[full].all()
        monotone = slice(0, -1)  # the last row is not monotone
        np.testing.assert_array_equal(full[monotone], all_seen[monotone])


def test_mask_area_counts_visible_pairs():
    rows = all_rows()
    np.testing.assert_array_equal(mask_area(rows), dense_mask(rows, 300).sum((1, 2)))


def test_fit_prefers_blocks_that_divide_the_size():
    assert fit(2048, 640, 128) == (512, 2048)
    assert fit(1280, 640, 128) == (640, 1280)
    assert fit(300, 640, 128) == (384, 384)
    assert fit(13 * 128, 640, 128) == (640, 1920)  # a block of 128 would cost more than padding


def ranges(*pairs):
    """A mask of one row from (start, stop) pairs."""
    return IntervalMask(*(jnp.asarray([x], jnp.int32) for x in zip(*pairs)))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (ranges((0, 1), (3, 2)), r"row 0, query 1 sees \[3, 2\): start is greater than stop"),
        (ranges((0, 1), (0, 5)), r"query 1 sees \[0, 5\): .* outside the 4 keys"),
        (ranges((-1, 1), (0, 1)), r"query 0 sees \[-1, 1\): .* outside the 4 keys"),
        (
            (ranges((0, 1), (0, 3)), ranges((1, 2), (2, 4))),
            r"query 1 sees \[0, 3\), \[2, 4\): .*overlap",
        ),
    ],
)
def test_invalid_mask_raises(masks, message):
    with pytest.raises(ValueError, match=message):
        check_mask(masks, 4)
    q, k, _ = random_qkv(2, 4, 1, 1)
    with pytest.raises(ValueError, match=message):
        interval_attention(q, k, k, masks, debug_checks=True)
    checked = jax.jit(functools.partial(interval_attention, debug_checks=True))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(checked(q, k, k, masks))
        jax.effects_barrier()


def test_unsupported_arguments_raise():
    q, k, v = random_qkv(4, 4, 2, 2, head_dim=64)
    fits = ranges(*[(0, 1)] * 4)
    for impl in ("tpu", "gpu"):
        with pytest.raises(ValueError, match=f"impl '{impl}' cannot run on platform 'cpu'"):
            interval_attention(q, k, v, fits, impl=impl)
    small = random_qkv(4, 4, 2, 2, head_dim=32)
    with pytest.raises(ValueError, match="impl 'tpu': head dim 32 is not one of 64, 128, 256"):
        choose(*small[:2], "tpu", "tpu")
    with pytest.raises(ValueError, match="impl 'gpu': head dim 32"):
        choose(*small[:2], "gpu", "cuda")
    half = [x.astype(jnp.float16) for x in (q, k)]
    with pytest.raises(ValueError, match="dtypes float16 and float16 are not both"):
        choose(*half, "tpu", "tpu")
    with pytest.raises(
        ValueError, match="32 query heads per key/value head exceed the limit of 16"
    ):
        choose(*random_qkv(4, 4, 32, 1, head_dim=128)[:2], "tpu", "tpu")
    with pytest.raises(ValueError, match="has no block sizes for chip 'TPU v2'"):
        tpu_attention(q, k, v, fits, chip="TPU v2")
    with pytest.raises(ValueError, match="empty tuple"):
        interval_attention(q, k, v, ())


def test_auto_selects_by_platform_and_shape():
    q, k, _ = random_qkv(128, 128, 2, 2, head_dim=64)
    assert [choose(q, k, "auto", p) for p in ("cpu", "tpu", "cuda")] == ["dense", "tpu", "gpu"]
    assert choose(q, k, "auto", "tpu", "TPU v5 lite") == "tpu"
    assert choose(q, k, "auto", "tpu", "TPU v2") == "dense"
    assert choose(q[:, :1], k, "auto", "tpu") == "dense"
    assert choose(q[..., :32], k[..., :32], "auto", "tpu") == "dense"


def test_mesh_that_does_not_divide_batch_or_heads_raises():
    q, k, _ = random_qkv(4, 4, 3, 3, head_dim=64)
    names = ("data", "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"axes .* have size 2: they do not divide the batch of 1"):
        attention_module._on_mesh(interpreted, AbstractMesh((1, 2, 2), names), q, k)
    with pytest.raises(ValueError, match="'tensor' has size 2: it does not divide the 3"):
        attention_module._on_mesh(interpreted, AbstractMesh((1, 1, 2), names), q, k)


def test_mesh_shards_batch_and_heads():
    """The kernel under shard_map and jit, data 2 and tensor 2, against dense attention."""
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = jax.tree.map(lambda x: x[:2, :128], all_rows())
    rows = IntervalMask(jnp.minimum(rows.start, 128), jnp.minimum(rows.stop, 128))
    q, k, v = random_qkv(128, 128, 4, 2, head_dim=128)
    q, k, v = (jnp.concatenate([x, x + 1]) for x in (q, k, v))
    run = attention_module._on_mesh(interpreted, mesh, q, k)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    placed = jax.device_put((q, k, v), sharding)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*placed, rows)[0]
    assert len({str(shard.index) for shard in got.addressable_shards}) == 4
    np.testing.assert_allclose(got, dense_attention(q, k, v, rows)[0], atol=2e-6)
