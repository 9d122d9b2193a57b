"""What tests of hand-written kernels share."""

import jax
import pytest


@pytest.fixture
def interpreted():
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"jax {jax.__version__} has no interpreter for kernels of Mosaic GPU")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
