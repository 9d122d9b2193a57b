"""The protocol of policies: a policy decides which sequences run a layer.

`dials_jax.skipping` has the policies of the papers. Any other class with the two methods of
`Policy` is one, too. It may have more members, which the functions below look for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.config import ModelConfig, shown
from dials_jax.errors import InputError, require
from dials_jax.nn.gates import Gate
from dials_jax.trees import is_unrolled


class Denoising(NamedTuple):
    """What a policy may know about a batch beside its hidden states.

    Attributes:
      masked: [MASK] now, and not padding. How much padding there is depends on the batch.
      step: denoising step, from 0: the same in all sequences, or one for each.
      sequence_keys: one random key per sequence.
      prompt_length: this many first tokens are never masked: routers leave them out.
      force_execute: True on the call that fills the caches, of all sequences or of each one. Every
        layer then runs, whatever its gate. Not those that are skipped for good: nothing ever
        reads their caches.
    """

    masked: Bool[Array, "B T"]
    step: Int[Array, "..."]
    sequence_keys: PyTree
    prompt_length: int = 0
    force_execute: Bool[Array, "..."] | None = None


@runtime_checkable
class Policy(Protocol):
    """Decides which sequences run a layer.

    Members that a policy may have beside these two:
      name: what reports call it. Without it: the name of its class.
      static_gates(num_layers) -> bool [L]: for a policy that skips the same layers at every step.
        They are known while tracing and leave no branch in an unrolled program. The two methods
        below are then not called.
      init_state(h, denoising) -> state: for a policy that carries a state from layer to layer.
        `gate` is then given it and returns it: `gate(prepared, h, denoising, state) -> (gate,
        state)`. A pytree of fixed shapes, whose leaves lead with the batch.
      closed_for_good: True where a layer that is skipped once is skipped at every step, by all
        sequences: nothing ever reads its cache, so it stays skipped on the call that fills the
        caches. Known while tracing, unlike the gates themselves.
      uses_keys: False where the gates do not depend on `sequence_keys`. Without it: they may.
      flops(cfg, num_tokens): of one decision on one sequence that looks at `num_tokens` tokens, an
        array. Without it: none.
    """

    def prepare(self, num_layers: int, denoising: Denoising) -> PyTree:
        """Everything known before the first layer, stacked or unrolled as layers are."""

    def gate(self, prepared: PyTree, h: Float[Array, "B T D"], denoising: Denoising) -> Gate:
        """Whether to run a layer, from its slice of `prepared`: one boolean, or one per sequence.

        A float gate is 0 or 1 with a straight-through gradient; only `select` takes it.
        """


def check_policy(policy: object) -> None:
    """Raises: InputError for anything but None or a policy."""
    is_policy = isinstance(policy, Policy) and not isinstance(policy, type)
    if policy is None or (is_policy and not jax.tree_util.all_leaves([policy])):
        return
    name = type(policy).__name__  # never the policy's text: its weights would be fetched for that
    require(
        not is_policy,
        f"policy {name} is no pytree; register it, as @jax.tree_util.register_dataclass does",
    )
    require(not hasattr(policy, "plan"), f"{name}.plan is now `{name}.prepare`; rename that method")
    raise InputError(f"policy={shown(policy)} is no policy; give None, or one as Static((7, 9))")


def policy_name(policy: Policy | None) -> str:
    """What reports call a policy; None runs the full model."""
    return "full" if policy is None else getattr(policy, "name", type(policy).__name__)


def uses_keys(policy: Policy | None) -> bool:
    """Whether equal sequences may get different gates, by their random keys."""
    return policy is not None and getattr(policy, "uses_keys", True)


def policy_flops(policy: Policy | None, cfg: ModelConfig, num_tokens: Any) -> Any:
    """FLOPs of one decision on one sequence that looks at `num_tokens` tokens."""
    flops = getattr(policy, "flops", None)
    return np.zeros_like(num_tokens) if flops is None else flops(cfg, num_tokens)


def static_gates(policy: Policy | None, num_layers: int) -> Bool[np.ndarray, "L"] | None:
    """The gates of every step where they never change, else None."""
    if policy is None:
        return np.ones(num_layers, bool)
    known = getattr(policy, "static_gates", None)
    return None if known is None else known(num_layers)


def skips_the_same(policy: Policy | None, num_layers: int) -> bool:
    """Whether all sequences skip the same layers at every step."""
    return getattr(policy, "closed_for_good", False) or static_gates(policy, num_layers) is not None


def init_policy_state(
    policy: Policy | None, h: Float[Array, "B T D"], denoising: Denoising
) -> PyTree:
    """What a policy carries into the first layer; None where it carries nothing."""
    init = getattr(policy, "init_state", None)
    return None if init is None else init(h, denoising)


def prepare_policy(policy: Policy, num_layers: int, denoising: Denoising) -> PyTree:
    """Everything known before the first layer.

    Raises: InputError where that has not one slice for each layer.
    """
    prepared = policy.prepare(num_layers, denoising)
    if is_unrolled(prepared):
        counts = {len(prepared)}
    else:
        counts = {(*jnp.shape(x), 0)[0] for x in jax.tree.leaves(prepared)}
    require(
        counts <= {num_layers},
        f"policy {policy_name(policy)!r}: prepare must give a slice for each of {num_layers} "
        f"layers, and gave {', '.join(map(str, sorted(counts)))}; give arrays [L, ...], several of "
        "them in a dict, for a tuple is taken for one entry a layer",
    )
    return prepared


def _checked_gate(policy: Policy, gate: Any, num_sequences: int) -> Gate:
    if isinstance(gate, bool | np.bool_):
        return np.bool_(gate)
    right, found = False, type(gate).__name__
    if isinstance(gate, jax.Array | np.ndarray):
        right = any(jnp.issubdtype(gate.dtype, kind) for kind in (jnp.bool_, jnp.floating))
        right = right and gate.shape in ((), (num_sequences,))
        found = f"{gate.dtype} of shape {list(gate.shape)}"
    require(
        right,
        f"policy {policy_name(policy)!r}: gate gave {found}; give one bool, or an array with one "
        f"for each sequence, [{num_sequences}]",
    )
    return gate


def decide_gate(
    policy: Policy, prepared: PyTree, h: Float[Array, "B T D"], denoising: Denoising, state: PyTree
) -> tuple[Gate, PyTree]:
    """The gate of a layer, and the state for the next one.

    Raises: InputError for what is neither one boolean nor one for each sequence.
    """
    if hasattr(policy, "init_state"):
        gate, state = policy.gate(prepared, h, denoising, state)
    else:
        gate = policy.gate(prepared, h, denoising)
    gate = _checked_gate(policy, gate, h.shape[0])
    force = denoising.force_execute
    if force is None or getattr(policy, "closed_for_good", False):
        return gate, state
    return gate | force, state
