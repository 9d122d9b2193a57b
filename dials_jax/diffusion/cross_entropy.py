"""Cross-entropy over a large vocabulary, at the tokens that count, without logits of all of them.

Half of a diffusion model's training tokens are not masked and have no loss. The head runs on those
that have one, one chunk after another: logits of a chunk are all that is ever held, and there are
no more chunks than such tokens fill. The loss is a sum whose weights are known beforehand, so each
chunk leaves its share of the gradients on its way: three products a token, where a backward pass
that computes the logits again needs four.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dials_jax.sharding import BATCH_AXES, num_batch_shards

CHUNK = 2048  # tokens; their logits are 0.4 GB for GPT-2's vocabulary
MULTIPLE = 128  # the vocabulary is filled up to one of these: odd widths miss the fast kernels


class HeadWeights(NamedTuple):
    """The last projection."""

    kernel: Float[Array, "D V"]
    bias: Float[Array, "V"] | None = None


class _How(NamedTuple):
    """What is known while tracing."""

    never: int | None
    train_head: bool
    chunk: int


class _Sums(NamedTuple):
    """What the loop fills. Gradients are None where nobody asks for them."""

    nats: Array  # a token's cross-entropy
    h: Array | None  # a token's gradient
    head: HeadWeights | None  # the gradient over all tokens, float32


def weighted_cross_entropy(
    h: Float[Array, "B T D"],
    head: HeadWeights,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    never: int | None = None,
    train_head: bool = True,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The sum of weight times cross-entropy, and each token's cross-entropy in nats.

    Products run in the dtype of `h`, the softmax in float32. Under a mesh every batch shard runs
    over its own tokens.

    Args:
      h: final states, each of which predicts its target.
      weights: 0 where a token has no loss. No gradient passes to them.
      never: a token that has probability 0, such as [MASK]; None: there is none.
      train_head: False spares the gradient of the head, which then is 0.
      chunk: tokens whose logits are held at a time.

    Returns: (total, nats). Gradients are those of the total; `nats`, 0 where the weight is, are
    for the eye and pass none.
    """
    return _loss(h, head, targets, weights, _How(never, train_head, chunk))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(h, head, targets, weights, how):
    nats = _over_shards(h, head, targets, weights, how, gradients=False).nats
    return jnp.sum(nats * weights), nats


def _forward(h, head, targets, weights, how):
    nats, *gradients = _over_shards(h, head, targets, weights, how, gradients=True)
    return (jnp.sum(nats * weights), nats), tuple(gradients)


def _backward(how, gradients, cotangents):
    slope, _ = cotangents
    h, head = jax.tree.map(lambda g: (slope * g).astype(g.dtype), gradients)
    return h, head, None, None


_loss.defvjp(_forward, _backward)


@jax.named_scope("cross_entropy")
def _over_shards(h, head, targets, weights, how: _How, gradients: bool) -> _Sums:
    """Every batch shard by itself, each with its own number of chunks.

    The head enters whole along the batch axes: a gather inside the loop would wait for shards with
    fewer chunks for ever. The tensor axis stays with the compiler.
    """
    local = partial(_over_rows, how=how, gradients=gradients)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty or mesh.manual_axes else num_batch_shards(mesh)
    if shards == 1 or h.shape[0] % shards:
        return local(h, head, targets, weights)

    def of_shard(*args):
        sums = local(*args)
        return sums._replace(head=lax.psum(sums.head, BATCH_AXES))

    rows = P(BATCH_AXES)
    return jax.shard_map(
        of_shard,
        in_specs=(rows, P(), rows, rows),
        out_specs=_Sums(rows, rows, P()),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(h, head, targets, weights)


def _over_rows(h, head: HeadWeights, targets, weights, how: _How, gradients: bool) -> _Sums:
    """The loop over chunks of the tokens that have a weight."""
    rows, num_tokens = targets.shape, targets.size
    h, targets, weights = h.reshape(num_tokens, -1), targets.ravel(), weights.ravel()
    kernel, bias = _aligned(head, how.never, h.dtype)
    chunk = min(how.chunk, num_tokens)
    places, num_chunks = _places(weights != 0, chunk)

    def body(i, sums: _Sums) -> _Sums:
        at = lax.dynamic_slice_in_dim(places, i * chunk, chunk)
        x, target = (a.at[at].get(mode="clip") for a in (h, targets))
        weight = weights.at[at].get(mode="fill", fill_value=0.0)
        nats, slope = _slopes(x, kernel, bias, target, weight)
        sums = sums._replace(nats=_put(sums.nats, at, nats))
        if sums.h is not None:
            sums = sums._replace(h=_put(sums.h, at, jnp.einsum("CV,DV->CD", slope, kernel)))
        if sums.head is not None:
            sums = sums._replace(head=_add(sums.head, x, slope))
        return sums

    empty = _Sums(
        nats=jnp.zeros(num_tokens),
        h=jnp.zeros_like(h) if gradients else None,
        head=_zeros(head, kernel.shape[1]) if gradients and how.train_head else None,
    )
    sums = lax.fori_loop(0, num_chunks, body, empty)
    return _Sums(
        nats=sums.nats.reshape(rows),
        h=sums.h.reshape(*rows, -1) if gradients else None,
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
    logits = jnp.einsum("CD,DV->CV", x, kernel, preferred_element_type=jnp.float32) + bias
    # A comparison fuses with its neighbours; a gather of the targets' logits would not.
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nats = normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    slope = weights[:, None] * (jnp.exp(logits - normaliser[:, None]) - is_target)
    return nats, slope.astype(x.dtype)


def _places(counted: Bool[Array, "N"], chunk: int) -> tuple[Int[Array, "_"], Int[Array, ""]]:
    """The places of the tokens that count, in whole chunks, and how many chunks they fill.

    Behind them are places that do not exist, each once: nothing is written there.
    """
    num_tokens = counted.size
    size = -(-num_tokens // chunk) * chunk
    index = jnp.arange(size)
    places = jnp.where(jnp.pad(counted, (0, size - num_tokens)), index, index + size)
    return jnp.sort(places), -(-jnp.sum(counted) // chunk)


def _put(x: Array, at: Int[Array, "C"], values: Array) -> Array:
    return x.at[at].set(values, mode="drop", unique_indices=True)


def _zeros(head: HeadWeights, width: int) -> HeadWeights:
    kernel = jnp.zeros((head.kernel.shape[0], width))
    return HeadWeights(kernel, None if head.bias is None else jnp.zeros(width))


def _add(gradient: HeadWeights, x: Float[Array, "C D"], slope: Float[Array, "C V"]) -> HeadWeights:
    kernel = jnp.einsum("CD,CV->DV", x, slope, preferred_element_type=jnp.float32)
    if gradient.bias is None:
        return HeadWeights(gradient.kernel + kernel)
    bias = jnp.sum(slope, axis=0, dtype=jnp.float32)
    return HeadWeights(gradient.kernel + kernel, gradient.bias + bias)


def _aligned(head: HeadWeights, never: int | None, dtype: Any) -> HeadWeights:
    """The head in the products' dtype with columns up to a multiple of 128, and a bias.

    The bias is float32, and minus infinity at what can never be.
    """
    vocab_size = head.kernel.shape[1]
    extra = -vocab_size % MULTIPLE
    bias = jnp.zeros(vocab_size) if head.bias is None else head.bias.astype(jnp.float32)
    bias = jnp.pad(bias, (0, extra), constant_values=-jnp.inf)
    if never is not None:
        bias = bias.at[never].set(-jnp.inf)
    return HeadWeights(jnp.pad(head.kernel.astype(dtype), ((0, 0), (0, extra))), bias)
