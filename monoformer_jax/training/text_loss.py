"""Cross-entropy over the vocabulary that never materializes the logits of a full batch.

A device sorts its tokens so that those with a target come first and processes them in chunks: logits,
loss and both gradients of a chunk are computed together, in the forward pass, and its logits are freed
before the next chunk. Chunks without any target (patches, prompts, padding) are skipped, so the cost
of the head is proportional to the text in the batch; the first chunk is smaller, since rows of images
hold few targets; and nothing is recomputed, as it would be under
`jax.checkpoint`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from monoformer_jax.nn.layers import float32_matmul
from monoformer_jax.parallel import BATCH, BATCH_AXES, DATA_AXIS, FSDP_AXIS, TENSOR_AXIS

MOST_LOGITS = 2**25  # per device at a time: 128 MiB in float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def text_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    z_loss: float = 0.0,
    most_logits: int = MOST_LOGITS,
) -> jax.Array:
    """Sum over tokens of weight times cross-entropy, float32 [].

    Operands of the products are in the compute dtype; logits, statistics and the gradient of the head
    are float32.

    Under a mesh each device processes its own batch rows (data, fsdp) and head columns (tensor);
    gradients are summed over devices once, after the last chunk.

    Args:
      hidden: [B, L, D] in the compute dtype.
      head: [D, V] float32; its columns from `vocab_size` on are padding and have probability 0.
      targets: int32 [B, L].
      weights: float32 [B, L]; not differentiated.
      z_loss: weight of the squared log-partition of each token, see `LossConfig`.
      most_logits: number of logits that a device holds at a time.
    """
    return _run(hidden, head, targets, weights, vocab_size, z_loss, most_logits, False)[0]


def _forward(hidden, head, targets, weights, vocab_size, z_loss, most_logits):
    loss, *grads = _run(hidden, head, targets, weights, vocab_size, z_loss, most_logits, True)
    return loss, (*grads, head)


def _backward(vocab_size, z_loss, most_logits, residuals, cotangent):
    d_hidden, d_head, head = residuals
    return (
        (d_hidden * cotangent).astype(d_hidden.dtype),
        (d_head * cotangent).astype(head.dtype),
        None,
        None,
    )


text_loss.defvjp(_forward, _backward)


@jax.named_scope("text_loss")
def _run(hidden, head, targets, weights, vocab_size, z_loss, most_logits, with_grads):
    """Loss [] and, if `with_grads`, gradients of hidden [B, L, D] and head [D, V], over all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(
        _on_device, vocab_size=vocab_size, z_loss=z_loss, most_logits=most_logits,
        with_grads=with_grads, mesh=not mesh.empty,
    )  # fmt: skip
    if mesh.empty:
        return local(*map(jnp.asarray, (hidden, head, targets, weights)))
    columns = P(FSDP_AXIS, TENSOR_AXIS)
    out = (P(), BATCH, columns) if with_grads else (P(),)
    return jax.shard_map(
        local, in_specs=(BATCH, columns, BATCH, BATCH), out_specs=out, check_vma=False
    )(hidden, head, targets, weights)


def _on_device(
    hidden, head, targets, weights, *, vocab_size, z_loss, most_logits, with_grads, mesh
):
    """`_run` on the rows and columns of one device."""
    dtype = hidden.dtype
    head, first = head.astype(dtype), 0
    if mesh:
        head = jax.lax.all_gather(head, FSDP_AXIS, axis=0, tiled=True)
        first = jax.lax.axis_index(TENSOR_AXIS) * head.shape[1]
    over_columns = functools.partial(_reduce, axes=TENSOR_AXIS if mesh else None)
    ids = first + jnp.arange(head.shape[1])  # token ids of this device's columns
    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    targets, weights = targets.reshape(-1), weights.reshape(-1)

    count = weights.size
    first_chunk, chunk = (_chunk(count, most_logits // part, head.shape[1]) for part in (4, 1))
    order = jnp.argsort(weights == 0, stable=True)
    # Out of bounds: weight 0.
    padded = jnp.pad(order, (0, (first_chunk - count) % chunk), constant_values=count)

    def add(begin, size, sums):
        at = jax.lax.dynamic_slice_in_dim(padded, begin, size)
        h, target, weight = (
            x.at[at].get(mode="fill", fill_value=0) for x in (hidden, targets, weights)
        )
        logits = float32_matmul(h, head)
        loss, d_logits = _cross_entropy(
            logits, target, weight, ids, vocab_size, z_loss, over_columns
        )
        if not with_grads:
            return (sums[0] + loss,)
        d_logits = d_logits.astype(dtype)
        d_h = float32_matmul(d_logits, head.T).astype(dtype)
        d_hidden = jax.lax.dynamic_update_slice(sums[1], d_h, (begin, 0))
        d_head = sums[2] + float32_matmul(h.T, d_logits)
        return sums[0] + loss, d_hidden, d_head

    # The same number of iterations on every device, because the body contains collectives.
    used = _reduce(jnp.sum(weights != 0), BATCH_AXES if mesh else None, jax.lax.pmax)
    sums = [jnp.zeros(())]
    if with_grads:
        sums += [jnp.zeros((padded.size, head.shape[0]), dtype), jnp.zeros(head.shape)]
    sums = add(0, first_chunk, tuple(sums))
    if first_chunk < count:
        turns = -(-(used - first_chunk) // chunk)
        sums = jax.lax.fori_loop(
            0, turns, lambda n, sums: add(first_chunk + n * chunk, chunk, sums), sums
        )
    loss = _reduce(sums[0], BATCH_AXES if mesh else None)
    if not with_grads:
        return (loss,)
    d_hidden = over_columns(sums[1][jnp.argsort(order)]).reshape(shape)
    d_head = sums[2]  # float32 also while it is summed over devices
    if mesh:
        d_head = jax.lax.psum_scatter(d_head, FSDP_AXIS, scatter_dimension=0, tiled=True)
        d_head = jax.lax.psum(d_head, DATA_AXIS)
    return loss, d_hidden, d_head


def _chunk(count: int, most_logits: int, columns: int) -> int:
    """Tokens of a chunk, at most `count`."""
    chunk = min(count, max(1, most_logits // columns))
    return chunk - (chunk % 128 if chunk > 128 else 0)  # full tiles


def _cross_entropy(logits, target, weight, ids, vocab_size, z_loss, over_columns):
    """Weighted sum over a chunk and its gradient w.r.t. the logits [tokens, V], V of this device;
    float32."""
    logits = jnp.where(ids < vocab_size, logits, jnp.finfo(jnp.float32).min)
    top = over_columns(logits.max(-1), op=jax.lax.pmax)[:, None]
    shifted = jnp.exp(logits - top)
    norm = over_columns(shifted.sum(-1))[:, None]
    is_target = target[:, None] == ids
    own = over_columns(jnp.where(is_target, logits, 0).sum(-1))
    log_z = jnp.log(norm) + top
    loss = jnp.sum(weight * (log_z - own[:, None])[:, 0])
    share = shifted / norm
    d_logits = (share - is_target) * weight[:, None]
    if z_loss:
        loss += z_loss * jnp.sum(weight * jnp.square(log_z)[:, 0])
        d_logits += 2 * z_loss * log_z * share * weight[:, None]
    return loss, d_logits


def _reduce(x: jax.Array, axes, op=jax.lax.psum) -> jax.Array:
    return op(x, axes) if axes else x
