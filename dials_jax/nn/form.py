"""The form that a model's parameters have for execution, as a value beside them."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dials_jax.trees import Params


@jax.tree_util.register_static
@dataclass(frozen=True)
class Form:
    """What was done to the parameters since they were initialised or read.

    It stands with them as `params["form"]`, a part of the tree's structure without a leaf; a tree
    without it is in the plain form, in which models are trained and saved. Whether layers are
    stacked or unrolled shows in their type: see `dials_jax.trees`.

    Attributes:
      fused: matmuls of one input are joined: see `dials_jax.nn.fusing`.
      modulated: the modulations of a constant are there: see `dials_jax.nn.modulation`.
      padded_head: the head's kernel is there once more, padded to whole tiles.
    """

    fused: bool = False
    modulated: bool = False
    padded_head: bool = False


PLAIN = Form()


def form_of(params: Params) -> Form:
    """The form of a whole model's parameters."""
    return params.get("form", PLAIN)
