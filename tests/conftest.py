"""Shared by all tests: shapes checked at run time, exact products, and a small model."""

from jaxtyping import install_import_hook

install_import_hook("dials_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from dials_jax.config import RouterConfig  # noqa: E402
from dials_jax.models import llada  # noqa: E402
from dials_jax.models.model import Model  # noqa: E402
from dials_jax.skipping.router import init_routers  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

MASK, EOS, PAD = 63, 1, 0


def small_config(**changes):
    """Four layers over a vocabulary of 64."""
    values = {
        "num_layers": 4, "d_model": 32, "vocab_size": 64, "mask_id": MASK, "eos_id": EOS,
        "pad_id": PAD, "head_dim": 8, "max_length": 64, "dtype": "float32",
    }  # fmt: skip
    return llada.small(**(values | changes))


def random_routers(cfg, seed=0, d_hidden=8):
    """Routers whose tokens really disagree: a random vote layer, not the zero it starts from."""
    router = RouterConfig(d_hidden=d_hidden, execute_bias=0.0)
    routers = init_routers(cfg.d_model, cfg.num_layers, router, jax.random.key(seed))
    noise = jax.random.normal(jax.random.key(seed + 1), routers["vote"].shape)
    return {**routers, "vote": 20.0 * noise}


@pytest.fixture(scope="session")
def cfg():
    return small_config()


@pytest.fixture(scope="session")
def model(cfg):
    return Model(cfg, llada.init(cfg, jax.random.key(0)))


@pytest.fixture(scope="session")
def routers(cfg):
    return random_routers(cfg)
