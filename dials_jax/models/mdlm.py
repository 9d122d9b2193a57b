"""Names that configurations of earlier versions import; see `families`."""

from dials_jax.models.families import COND_DIM, mdlm, mdlm_small

small = mdlm_small
__all__ = ["COND_DIM", "mdlm", "small"]
