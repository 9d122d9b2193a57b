"""Cross-entropy over a large vocabulary, at the tokens that count, without logits of all of them.

Half of a diffusion model's training tokens are not masked and have no loss. The head runs only on
those that have one, chunk by chunk: the logits of one chunk are all that is ever held. The backward
pass is fused into the forward loop, since the weights of the loss are known beforehand, so each
token needs three matmuls instead of the four of recomputation.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dials_jax.diffusion.subs import suppress_token
from dials_jax.nn.kernels.row_sums import logsumexp
from dials_jax.nn.linear import linear
from dials_jax.sharding import BATCH_AXES, num_batch_shards

CHUNK = 2048  # tokens; their logits are 0.4 GB for GPT-2's vocabulary
MULTIPLE = 128  # the vocabulary is padded to a multiple of this: odd widths miss fast kernels


class HeadWeights(NamedTuple):
    """The last projection."""

    kernel: Float[Array, "D V"]
    bias: Float[Array, "V"] | None = None


class _Settings(NamedTuple):
    """What is known while tracing."""

    suppressed_id: int | None
    train_head: bool
    chunk: int


class _Sums(NamedTuple):
    """What the loop fills. Gradients are None where nobody asks for them."""

    nats: Array  # each token's cross-entropy
    h: Array | None  # each token's gradient
    head: HeadWeights | None  # the gradient over all tokens, float32


def weighted_cross_entropy(
    h: Float[Array, "B T D"],
    head: HeadWeights,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    suppressed_id: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The sum of weight times cross-entropy, with gradients for the states and the head.

    Matmuls run in the dtype of `h`, the softmax in float32. Under a mesh every batch shard runs
    over its own tokens.

    Args:
      h: final states, each of which predicts its target.
      weights: 0 where a token has no loss. No gradient passes to them.
      suppressed_id: a token that has probability 0, such as [MASK]; None: there is none.
      chunk: tokens whose logits are held at a time.

    Returns: (total, nats). `nats` are the cross-entropies of the tokens with a weight, 0 elsewhere;
    they are metrics and pass no gradient.
    """
    return _total(h, head, targets, weights, _Settings(suppressed_id, True, chunk))


def sequence_cross_entropy(
    h: Float[Array, "B T D"],
    head: HeadWeights,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    suppressed_id: int | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B"], Float[Array, "B T"]]:
    """`weighted_cross_entropy` with one sum per sequence, under a frozen head.

    Each sequence's sum may enter the loss in its own way, as in DIALS (10). The head gets no
    gradient: fused with the forward loop, it would be that of one total only.

    Returns: (sums, nats).
    """
    return _per_sequence(h, head, targets, weights, _Settings(suppressed_id, False, chunk))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(h, head, targets, weights, settings):
    nats = _over_shards(h, head, targets, weights, settings, gradients=False).nats
    return jnp.sum(nats * weights), nats


def _total_forward(h, head, targets, weights, settings):
    nats, *gradients = _over_shards(h, head, targets, weights, settings, gradients=True)
    return (jnp.sum(nats * weights), nats), tuple(gradients)


def _total_backward(settings, gradients, cotangents):
    slope, _ = cotangents
    h, head = jax.tree.map(lambda g: (slope * g).astype(g.dtype), gradients)
    return h, head, None, None


_total.defvjp(_total_forward, _total_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _per_sequence(h, head, targets, weights, settings):
    nats = _over_shards(h, head, targets, weights, settings, gradients=False).nats
    return jnp.sum(nats * weights, axis=1), nats


def _per_sequence_forward(h, head, targets, weights, settings):
    nats, gradient, _ = _over_shards(h, head, targets, weights, settings, gradients=True)
    return (jnp.sum(nats * weights, axis=1), nats), gradient


def _per_sequence_backward(settings, gradient, cotangents):
    slope, _ = cotangents
    return (slope[:, None, None] * gradient).astype(gradient.dtype), None, None, None


_per_sequence.defvjp(_per_sequence_forward, _per_sequence_backward)


@jax.named_scope("cross_entropy")
def _over_shards(h, head, targets, weights, settings: _Settings, gradients: bool) -> _Sums:
    """Runs every batch shard by itself, each with its own number of chunks.

    The head enters whole along the batch axes: a gather inside the loop would deadlock, waiting for
    shards with fewer chunks. The tensor axis stays with the compiler.
    """
    local = partial(_over_chunks, settings=settings, gradients=gradients)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty or mesh.manual_axes else num_batch_shards(mesh)
    if shards == 1 or h.shape[0] % shards:
        return local(h, head, targets, weights)

    def of_shard(*args):
        sums = local(*args)
        return sums._replace(head=lax.psum(sums.head, BATCH_AXES))

    sequences = P(BATCH_AXES)
    return jax.shard_map(
        of_shard,
        in_specs=(sequences, P(), sequences, sequences),
        out_specs=_Sums(sequences, sequences, P()),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(h, head, targets, weights)


def _over_chunks(
    h, head: HeadWeights, targets, weights, settings: _Settings, gradients: bool
) -> _Sums:
    """Loops over chunks of the tokens that have a weight."""
    shape, num_tokens = targets.shape, targets.size
    h, targets, weights = h.reshape(num_tokens, -1), targets.ravel(), weights.ravel()
    kernel, bias = _aligned_head(head, settings.suppressed_id, h.dtype)
    chunk = min(settings.chunk, num_tokens)
    positions, num_chunks = _positions(weights != 0, chunk)

    def body(i, sums: _Sums) -> _Sums:
        at = lax.dynamic_slice_in_dim(positions, i * chunk, chunk)
        x, target = (a.at[at].get(mode="clip") for a in (h, targets))
        weight = weights.at[at].get(mode="fill", fill_value=0.0)
        nats, slope = _slopes(x, kernel, bias, target, weight)
        sums = sums._replace(nats=_scatter(sums.nats, at, nats))
        if sums.h is not None:
            sums = sums._replace(h=_scatter(sums.h, at, linear(slope, kernel, axes="CV,DV->CD")))
        if sums.head is not None:
            sums = sums._replace(head=_add_head_gradient(sums.head, x, slope))
        return sums

    empty = _Sums(
        nats=jnp.zeros(num_tokens),
        h=jnp.zeros_like(h) if gradients else None,
        head=_zero_head(head, kernel.shape[1]) if gradients and settings.train_head else None,
    )
    sums = lax.fori_loop(0, num_chunks, body, empty)
    return _Sums(
        nats=sums.nats.reshape(shape),
        h=sums.h.reshape(*shape, -1) if gradients else None,
        head=jax.tree.map(lambda g: g[..., : head.kernel.shape[1]], sums.head),
    )


def _slopes(
    x: Float[Array, "C D"],
    kernel: Float[Array, "D V"],
    bias: Float[Array, "V"],
    targets: Int[Array, "C"],
    weights: Float[Array, "C"],
) -> tuple[Float[Array, "C"], Float[Array, "C V"]]:
    """Cross-entropies, and the gradient of their weighted sum to the logits."""
    logits = linear(x, kernel, bias, axes="CD,DV->CV", dtype=jnp.float32)
    # A comparison fuses with its neighbours; a gather of the targets' logits would not.
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    normaliser = logsumexp(logits)
    nats = normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    slope = weights[:, None] * (jnp.exp(logits - normaliser[:, None]) - is_target)
    return nats, slope.astype(x.dtype)


def _positions(counted: Bool[Array, "N"], chunk: int) -> tuple[Int[Array, "_"], Int[Array, ""]]:
    """The positions of the tokens that count, in whole chunks, and how many chunks they fill.

    After them come positions out of range, each once: nothing is written there.
    """
    num_tokens = counted.size
    size = -(-num_tokens // chunk) * chunk
    index = jnp.arange(size)
    positions = jnp.where(jnp.pad(counted, (0, size - num_tokens)), index, index + size)
    return jnp.sort(positions), -(-jnp.sum(counted) // chunk)


def _scatter(x: Array, at: Int[Array, "C"], values: Array) -> Array:
    return x.at[at].set(values, mode="drop", unique_indices=True)


def _zero_head(head: HeadWeights, width: int) -> HeadWeights:
    kernel = jnp.zeros((head.kernel.shape[0], width))
    return HeadWeights(kernel, None if head.bias is None else jnp.zeros(width))


def _add_head_gradient(
    gradient: HeadWeights, x: Float[Array, "C D"], slope: Float[Array, "C V"]
) -> HeadWeights:
    kernel = jnp.einsum("CD,CV->DV", x, slope, preferred_element_type=jnp.float32)
    if gradient.bias is None:
        return HeadWeights(gradient.kernel + kernel)
    bias = jnp.sum(slope, axis=0, dtype=jnp.float32)
    return HeadWeights(gradient.kernel + kernel, gradient.bias + bias)


def _aligned_head(head: HeadWeights, suppressed_id: int | None, dtype: Any) -> HeadWeights:
    """The head in the matmuls' dtype, its columns padded to a multiple of 128, with a bias.

    The bias is float32, and minus infinity at padding and at the suppressed token.
    """
    vocab_size = head.kernel.shape[1]
    extra = -vocab_size % MULTIPLE
    bias = jnp.zeros(vocab_size) if head.bias is None else head.bias.astype(jnp.float32)
    bias = jnp.pad(bias, (0, extra), constant_values=-jnp.inf)
    if suppressed_id is not None:
        bias = suppress_token(bias, suppressed_id)
    return HeadWeights(jnp.pad(head.kernel.astype(dtype), ((0, 0), (0, extra))), bias)
