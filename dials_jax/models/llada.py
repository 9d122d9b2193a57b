"""Names that configurations of earlier versions import; see `families`."""

from dials_jax.models.families import llada_8b, llada_small

small = llada_small
__all__ = ["llada_8b", "small"]
