"""The path of ES-dLLM's tokens through the layers: at some layers only important ones are kept.

    span 0          | span 1          | span 2 ...          indicator "hidden": tokens are skipped
    all tokens      | the top half    | the top quarter     between two spans
                    ^                 ^
              keep_top_tokens   keep_top_tokens

With another indicator, tokens are skipped inside a layer, between its projections and its
attention. That layer is then a separate span.

An index or position is where a token runs on the canvas. In a shifted model (Dream) the token that
it predicts lies one to the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.caching.cache import ForwardInputs
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.importance import fixed_bonus, indicator_change
from dials_jax.models import transformer
from dials_jax.nn.block import BlockInputs
from dials_jax.nn.kv import KV, Slots, gather, write_slots
from dials_jax.nn.modules import form_of
from dials_jax.sharding import constrain_batch

Indicator = Literal["hidden", "query", "key", "value"]


class SkipPlan(NamedTuple):
    """The settings of `EarlySkip` for one model and one block length.

    Attributes:
      layers: where tokens are skipped.
      proportions: of the block that is kept, before the first of these layers and from each on.
      kept: the same in tokens, as long as no step reveals more than the sampler's quota.
    """

    alpha: float
    indicator: Indicator
    layers: tuple[int, ...]
    proportions: tuple[float, ...]
    kept: tuple[int, ...]

    @property
    def skips_inside(self) -> bool:
        return self.indicator != "hidden"

    def spans(self, num_layers: int) -> list[tuple[int, int]]:
        """Ranges of layers that run on equally many tokens."""
        if self.skips_inside:
            cuts = [cut for layer in self.layers for cut in (layer, layer + 1)]
        else:
            cuts = [layer + 1 for layer in self.layers]
        spans = zip([0, *cuts], [*cuts, num_layers], strict=True)
        return [(first, last) for first, last in spans if first < last]

    def depth(self, layer: int) -> int:
        """How often tokens have been skipped when `layer` has its attention."""
        return sum(layer >= at if self.skips_inside else layer > at for at in self.layers)

    def tokens(self, layer: int) -> tuple[int, int]:
        """Tokens of the block on which `layer` runs, and those that get queries, keys and values
        there."""
        depth = self.depth(layer)
        inside = self.skips_inside and layer in self.layers
        return self.kept[depth], self.kept[depth - inside]


class EarlySkipState(NamedTuple):
    """What ES-dLLM keeps, for the canvas's positions S."""

    kv: tuple[PyTree, ...]  # one per span of layers
    seen: tuple[Array, ...]  # [R, S, ...] hidden states or queries, one per layer of the plan
    confidence: Float[Array, "R S"]  # of the token last proposed; 0 where none can be revealed
    revealed: Bool[Array, "R S"]  # by the last step


def empty_state(plan: SkipPlan, net: CanvasModel) -> EarlySkipState:
    cfg, shape = net.cfg, (net.num_sequences, net.length)
    width = {"hidden": (cfg.d_model,), "query": (cfg.num_heads, cfg.head_dim)}
    # Old keys and values are in the cache anyway.
    seen = constrain_batch(jnp.zeros((*shape, *width.get(plan.indicator, (0,))), cfg.dtype))
    return EarlySkipState(
        tuple(net.init_cache(span) for span in plan.spans(cfg.num_layers)),
        (seen,) * len(plan.layers),
        constrain_batch(jnp.zeros(shape)),
        constrain_batch(jnp.zeros(shape, bool)),
    )


class ActiveTokens(NamedTuple):
    """The tokens of a window that have not been skipped so far."""

    h: Float[Array, "R W D"]
    window: BlockInputs
    masked: Bool[Array, "R W"]
    confidence: Float[Array, "R W"]
    bonus: Float[Array, "R W"]  # the terms of their importance that no layer changes

    def take(self, chosen: Int[Array, "R w"], active: Bool[Array, "R w"] | None) -> ActiveTokens:
        h, angles, index, masked, confidence, bonus = gather(
            (self.h, self.window.angles, self.window.slots.index, *self[2:]), chosen
        )
        window = BlockInputs(angles, self.window.mask, Slots(index, active))
        return ActiveTokens(h, window, masked, confidence, bonus)


# keep(depth, tokens, change) -> which tokens of the window are kept, and which of these are active.
Keep = Callable[[int, ActiveTokens, Array], tuple[Array, "Array | None"]]


def enter_window(
    plan: SkipPlan,
    net: CanvasModel,
    inputs: ForwardInputs,
    state: EarlySkipState,
    index: Int[Array, "R W"],
    active: Bool[Array, "R _"] | None,
) -> ActiveTokens:
    """The tokens at `index` before the first layer."""
    tokens = gather(inputs.tokens, index)
    active = None if active is None else jnp.broadcast_to(active, index.shape)
    predicted = jnp.minimum(index + net.logit_shift, net.length - 1)
    masked = transformer.is_masked(net.cfg, gather(inputs.tokens, predicted))
    bonus = fixed_bonus(masked, gather(state.revealed, index), plan.alpha)
    window, confidence = net.window(index, active), gather(state.confidence, index)
    return ActiveTokens(
        net.embed(tokens, window), window, net.is_masked(tokens, index), confidence, bonus
    )


def run_spans(
    plan: SkipPlan,
    net: CanvasModel,
    inputs: ForwardInputs,
    state: EarlySkipState,
    tokens: ActiveTokens,
    keep: Keep | None,
    *,
    output_positions: Int[Array, "R _"] | None = None,
    prompt_length: int = 0,
) -> tuple[ActiveTokens, Bool[Array, "L R"], EarlySkipState, Int[Array, "R T"] | None]:
    """Runs all layers on a window; `keep` chooses the tokens to keep at each layer of the plan.

    Args:
      keep: None: all tokens are kept.
      output_positions: in the window, of the tokens whose outputs are asked for; None: of all.
      prompt_length: no token of the window before this one is masked, and none is skipped.

    Returns: the tokens that are left, the gates, the state, and `CanvasModel.depth`.
    """
    kv, seen, gates, policy_state = list(state.kv), list(state.seen), [], None
    reached = None
    for i, span in enumerate(plan.spans(net.cfg.num_layers)):
        depth = plan.depth(span[0])
        if plan.skips_inside and span[0] in plan.layers:
            tokens, kv[i], seen[depth - 1] = skip_inside_layer(
                plan, net, span[0], tokens, kv[i], seen[depth - 1], keep
            )
            gates.append(jnp.ones((1, tokens.h.shape[0]), bool))
            reached = net.depth(tokens.window.slots, span[1], reached)
            continue
        reached = net.depth(tokens.window.slots, span[1], reached)
        out = net.run_layers(
            tokens.h, tokens.window, tokens.masked, inputs.step, kv[i],
            span=span, contiguous=keep is None or depth == 0, prompt_length=prompt_length,
            output_positions=output_positions, policy_state=policy_state,
        )  # fmt: skip
        tokens, kv[i], policy_state = tokens._replace(h=out.h), out.cache_state, out.policy_state
        gates.append(out.gates)
        if not plan.skips_inside and depth < len(plan.layers):
            tokens, _ = skip_tokens(depth + 1, tokens, out.h, seen[depth], keep)
            slots = tokens.window.slots
            seen[depth] = write_slots(seen[depth], tokens.h, slots, contiguous=keep is None)
    state = state._replace(kv=tuple(kv), seen=tuple(seen))
    return tokens, jnp.concatenate(gates), state, reached


def skip_inside_layer(
    plan: SkipPlan,
    net: CanvasModel,
    layer: int,
    tokens: ActiveTokens,
    kv: PyTree,
    seen: Array,
    keep: Keep | None,
) -> tuple[ActiveTokens, PyTree, Array]:
    """Runs one layer that skips tokens once their queries, keys and values are known.

    Skipping them before the layer would be simpler, but would project the others twice.
    """
    params = trees.layer_slice(net.params["layers"], layer)
    block = transformer.layer_of(net.cfg, form_of(net.params))
    old: KV = trees.layer_slice(kv, 0)
    q, new = block.project(params, tokens.h, tokens.window)
    indicators = {"query": (q, seen), "key": (new.k, old.k), "value": (new.v, old.v)}
    tokens, (q, new) = skip_tokens(
        plan.depth(layer), tokens, *indicators[plan.indicator], keep, (q, new)
    )
    slots = tokens.window.slots
    if plan.indicator == "query":
        seen = write_slots(seen, q, slots, contiguous=keep is None)
    written = write_slots(old, new, slots, contiguous=keep is None)
    h = block.mix(params, tokens.h, q, written, tokens.window)
    unrolled = trees.is_unrolled(net.params["layers"])
    kv = (written,) if unrolled else jax.tree.map(lambda x: x[None], written)
    return tokens._replace(h=h), kv, seen


def skip_tokens(
    depth: int,
    tokens: ActiveTokens,
    indicator: Float[Array, "R W ..."],
    seen: Float[Array, "R S ..."],
    keep: Keep | None,
    beside: PyTree = (),
) -> tuple[ActiveTokens, PyTree]:
    """The tokens that are kept at `depth`, and the same tokens' entries of `beside` [R, W, ...].

    Args:
      indicator: whose change since `seen`, on the canvas, counts in a token's importance.
    """
    if keep is None:
        return tokens, beside
    slots = tokens.window.slots
    change = indicator_change(indicator, gather(seen, slots.index), slots.active)
    chosen, active = keep(depth, tokens, change)
    return tokens.take(chosen, active), gather(beside, chosen)
