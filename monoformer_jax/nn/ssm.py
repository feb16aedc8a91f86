"""Bidirectional S4D: a diagonal state-space model of each channel, as a long convolution.

    x'(t) = A x(t) + u(t),  y(t) = 2 Re(C x(t)) + skip u(t)      N/2 complex states of a channel; N = 64
    y_l = sum_{m <= l} K_{l-m} u_m + skip u_l
    K_l = 2 Re(sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l))

A = -exp(log_decay) + i frequency is initialised to -1/2 + i pi n (S4D-Lin), the step dt of a channel
log-uniformly in [0.001, 0.1], and C to a standard complex normal; zero-order hold discretises it
(arXiv 2206.11893). The second direction runs on the reversed sequence, with parameters of its own.

Two forms compute the same convolution:

    fft       through the spectra of u and K, padded to 2 L; float32
    chunked   matrix products: inside a chunk with the Toeplitz matrices of K, and between chunks
              through the states at their borders, float32, summed in log2(L / chunk) steps
"""

from __future__ import annotations

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P

from monoformer_jax.errors import require
from monoformer_jax.nn.layers import parameter
from monoformer_jax.parallel import BATCH_AXES, TENSOR_AXIS

FORMS = ("auto", "fft", "chunked")
STEPS = (1e-3, 1e-1)  # range of the initial steps
_EXACT = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class Kernels:
    """Discretised state-space models of both directions: K_l = 2 Re(sum_n weight_n exp(dt A_n l))."""

    log_step: jax.Array  # float32 [2, D, 1], log dt
    a: jax.Array  # complex64 [2, D, N/2]
    weight: jax.Array  # complex64 [2, D, N/2], C (exp(dt A) - 1) / A
    skip: jax.Array  # float32 [2, D]

    def powers(self, offsets: jax.Array) -> jax.Array:
        """exp(dt A l) of the offsets l [T], complex64 [2, D, N/2, T]."""
        log_step, a = self.log_step[..., None], self.a[..., None]
        return _powers(log_step, a.real, a.imag, offsets.astype(jnp.float32))

    def values(self, length: int) -> jax.Array:
        """K_0 … K_{length - 1}, float32 [2, D, length]."""
        # exp(dt A (q block + r)) as a product takes sqrt(length) exponentials of each state.
        block = 1 << math.ceil(math.log2(length) / 2)
        outer = self.weight[..., None] * self.powers(block * jnp.arange(-(-length // block)))
        inner = self.powers(jnp.arange(block))
        values = jnp.einsum(
            "gdnq,gdnr->gdqr", jnp.concatenate([outer.real, -outer.imag], 2),
            jnp.concatenate([inner.real, inner.imag], 2), precision=_EXACT,
        )  # fmt: skip
        return 2 * values.reshape(*values.shape[:2], -1)[..., :length]


# exp of multiples of 1/256 from -16 to 4: the leading 12 bits, and the rest.
_GRID = np.exp(np.arange(-16 * 256, 4 * 256 + 1) / 256)
_LEADING = (np.float32(_GRID).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
_REST = np.float32(_GRID - _LEADING)


@jax.custom_jvp
def _powers(log_step: jax.Array, real: jax.Array, imag: jax.Array, l: jax.Array) -> jax.Array:
    """exp(exp(log_step) (real + i imag) l), complex64; broadcasts float32 arguments.

    A phase of 1000 radians in float32 is off by up to 6e-5, which the gradient of log_step multiplies.
    So dt, and the phase dt imag l, are sums of two numbers: products of 12 leading bits, which are
    exact, and a small rest.
    """
    index = jnp.clip(jnp.round(log_step * 256), -16 * 256, 4 * 256)
    excess = jnp.expm1(log_step - index / 256)
    index = index.astype(jnp.int32) + 16 * 256
    leading, rest = jnp.asarray(_LEADING)[index], jnp.asarray(_REST)[index]
    rest = rest + (leading + rest) * excess
    (product, product_rest), (factor, factor_rest) = _split(leading * l), _split(imag)
    exact = product * factor
    small = product * factor_rest + product_rest * imag + rest * l * imag
    size = jnp.exp((leading + rest) * l * real)
    phase = jax.lax.complex(jnp.cos(exact), jnp.sin(exact))
    return size * phase * jax.lax.complex(jnp.cos(small), jnp.sin(small))


@_powers.defjvp
def _powers_jvp(values, tangents):
    log_step, real, imag, l = values
    power, (d_log_step, d_real, d_imag, _) = _powers(*values), tangents
    step = jnp.exp(log_step)
    d_rate = jax.lax.complex(
        step * (real * d_log_step + d_real), step * (imag * d_log_step + d_imag)
    )
    return power, power * (l * d_rate)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 as its 12 leading bits and the rest; the sum is exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return leading, x - leading


class S4D(nnx.Module):
    """Parameters of one direction, float32. Those of A have one axis, so that they do not decay."""

    def __init__(self, dim: int, state_size: int, rngs: nnx.Rngs):
        low, high = map(math.log, STEPS)
        steps = jax.random.uniform(rngs.params(), (dim,), minval=low, maxval=high)
        self.log_step = nnx.Param(steps, axes=("mlp",))
        states = state_size // 2
        decay = jnp.full(dim * states, math.log(0.5), jnp.float32)
        self.log_decay = nnx.Param(decay, axes=("mlp",))
        frequency = jnp.tile(math.pi * jnp.arange(states, dtype=jnp.float32), dim)
        self.frequency = nnx.Param(frequency, axes=("mlp",))
        self.output = parameter(rngs, (dim, states, 2), ("mlp", None, None), 0.5**0.5)
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (dim,)), axes=("mlp",))


class BidirectionalSSM(nnx.Module):
    """[B, L, D] -> [B, L, 2, D]: the outputs of both directions."""

    def __init__(self, dim: int, state_size: int, rngs: nnx.Rngs):
        self.forward = S4D(dim, state_size, rngs)
        self.backward = S4D(dim, state_size, rngs)

    def kernels(self) -> Kernels:
        def both(name):
            return jnp.stack([getattr(one, name)[...] for one in (self.forward, self.backward)])

        output = both("output").astype(jnp.float32)
        shape = output.shape[:-1]
        decay, frequency = (both(x).reshape(shape) for x in ("log_decay", "frequency"))
        a = jax.lax.complex(-jnp.exp(decay.astype(jnp.float32)), frequency.astype(jnp.float32))
        log_step = both("log_step").astype(jnp.float32)[..., None]
        c = jax.lax.complex(output[..., 0], output[..., 1])
        weight = c * jnp.expm1(jnp.exp(log_step) * a) / a
        return Kernels(log_step, a, weight, both("skip").astype(jnp.float32))

    def __call__(self, u: jax.Array, form: str = "auto", chunk: int = 128) -> jax.Array:
        return convolve(self.kernels(), u, form, chunk)


def convolve(kernels: Kernels, u: jax.Array, form: str = "auto", chunk: int = 128) -> jax.Array:
    """Convolves a sequence with the kernels of both directions.

    Args:
      u: [B, L, D] in the compute dtype.
      form: "fft", "chunked", or "auto": the faster one of this platform, see `bench ssm`.
      chunk: length of a chunk; a shorter sequence is one chunk.

    Returns:
      [B, L, 2, D] in the dtype of u.

    Raises:
      InputError: "chunked" and L is not a multiple of the chunk.
    """
    chunk = min(chunk, u.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    # In ahead-of-time compilation the mesh's devices are not those of jax.devices().
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    if form == "auto":
        form = "chunked" if device.platform == "tpu" else "fft"
    require(
        form == "fft" or u.shape[1] % chunk == 0,
        f"a sequence of {u.shape[1]} is not a multiple of the chunk of {chunk}",
    )
    run = functools.partial(_FORMS[form], chunk=chunk)
    if not mesh.empty:  # rows and channels are independent; XLA would gather the operands of an FFT
        run = jax.shard_map(
            run, in_specs=(P(None, TENSOR_AXIS), P(BATCH_AXES, None, TENSOR_AXIS)),
            out_specs=P(BATCH_AXES, None, None, TENSOR_AXIS), check_vma=False,
        )  # fmt: skip
    mixed = run(kernels, u)
    return mixed.astype(u.dtype) + kernels.skip.astype(u.dtype) * u[:, :, None]


def _fft(kernels: Kernels, u: jax.Array, chunk: int) -> jax.Array:
    length = u.shape[1]
    spectrum = jnp.fft.rfft(u.astype(jnp.float32), 2 * length, axis=1)[:, :, None]
    forward, backward = jnp.fft.rfft(kernels.values(length), 2 * length).transpose(0, 2, 1)
    # The reversed direction is a correlation, whose spectrum is conjugate.
    product = spectrum * jnp.stack([forward, backward.conj()], 1)
    return jnp.fft.irfft(product, 2 * length, axis=1)[:, :length]


def _chunked(kernels: Kernels, u: jax.Array, chunk: int) -> jax.Array:
    batch, count = len(u), u.shape[1] // chunk
    product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32,
        precision=_EXACT if u.dtype == jnp.float32 else None,
    )  # fmt: skip
    # Channels come first and m = (chunk, sequence) last, as the products make them: TPU lays out the
    # last axis in lanes of 128, which chunks or states alone would not fill.
    u = rearrange(u, "b (c j) d -> (c b) j d", j=chunk)
    steps, toeplitz = jnp.arange(chunk), _toeplitz(kernels.values(chunk))
    y = product("gdij,mjd->dgim", toeplitz.astype(u.dtype), u)
    if count > 1:
        forward, backward = kernels.powers(steps)  # [D, N/2, chunk]
        # What a chunk adds to the state after it.
        collect = jnp.stack([forward[..., ::-1], backward])
        added = product("gdnj,mjd->gdnm", _pairs(collect).astype(u.dtype), u)
        decays = kernels.powers(chunk * 2 ** jnp.arange((count - 1).bit_length()))
        # The second direction begins at the end.
        states = [_pass_on(added[0], decays[0], batch), _pass_on(added[1], decays[1], -batch)]
        states = jnp.stack(states).astype(u.dtype)
        emit = (2 * kernels.weight[..., None]) * kernels.powers(steps + 1)
        emit = jnp.stack([emit[0], emit[1, ..., ::-1]]).conj()
        y += product("gdni,gdnm->dgim", _pairs(emit).astype(u.dtype), states)
    return rearrange(y.astype(u.dtype), "d g i (c b) -> b (c i) g d", b=batch)


def _pass_on(added: jax.Array, decays: jax.Array, step: int) -> jax.Array:
    """States before each chunk, from what the chunks add to them, [D, N, m] float32.

    Args:
      added: real parts, then imaginary parts.
      decays: complex64 [D, N/2, k]: of 1, 2, 4, … chunks.
      step: distance of neighbouring chunks on m; negative: the last chunk is the first.
    """
    real, imag = jnp.split(_shift(added, step), 2, 1)
    for k in range(decays.shape[-1]):
        decay = decays[..., k : k + 1]
        moved_real, moved_imag = _shift(real, step * 2**k), _shift(imag, step * 2**k)
        real, imag = (
            real + decay.real * moved_real - decay.imag * moved_imag,
            imag + decay.real * moved_imag + decay.imag * moved_real,
        )
    return jnp.concatenate([real, imag], 1)


def _shift(x: jax.Array, by: int) -> jax.Array:
    """Moves the last axis to the right, to the left if `by` is negative, and fills with 0."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)])


def _toeplitz(values: jax.Array) -> jax.Array:
    """[2, D, T] -> [2, D, T, T]: K_{i-j} at (i, j), in the second direction K_{j-i}; 0 elsewhere."""
    forward, backward = values
    zeros = jnp.zeros_like(forward)
    # Row 0 of a circulant matrix; cutting one column of every repetition moves each row by one.
    row = jnp.stack([
        jnp.concatenate([forward[:, :1], zeros, forward[:, :0:-1]], 1),
        jnp.concatenate([backward, zeros], 1),
    ])  # fmt: skip
    size = values.shape[-1]
    rows = jnp.tile(row, size)[..., : size * (2 * size - 1)]
    return rows.reshape(*values.shape, 2 * size - 1)[..., :size]


def _pairs(x: jax.Array) -> jax.Array:
    """Real and imaginary parts of [2, D, N/2, T], concatenated to [2, D, N, T]."""
    return jnp.concatenate([x.real, x.imag], 2)


_FORMS = {"fft": _fft, "chunked": _chunked}


def flops(form: str, length: int, dim: int, state_size: int, chunk: int = 128) -> int:
    """FLOPs of convolving one sequence of L tokens in both directions, without making the kernels.

    chunked: its matrix products, two per multiply-add. fft: 2.5 n log2 n per transform of n = 2 L real
    values, of which a channel has three, and the products of the spectra.
    """
    if form == "chunked":
        chunk = min(chunk, length)
        between = 0 if chunk == length else 2 * state_size
        return 2 * 2 * length * dim * (chunk + between)
    size = 2 * length
    return round(dim * (3 * 2.5 * size * math.log2(size) + 2 * 6 * (length + 1)))
