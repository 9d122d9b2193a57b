"""Shared by all tests: shapes checked at run time, exact products, and a small model."""

import fcntl
import functools
import gc
import os
import shutil
from importlib.metadata import version
from pathlib import Path

# Tests compile many small programs and run each for a moment: these flags save two thirds of it.
QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jax").startswith("0.10."):  # later ones do not know this flag
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
# Once each, also where a worker inherits them: the cache's keys hold the flags as they are written.
FLAGS = dict.fromkeys([*os.environ.get("XLA_FLAGS", "").split(), *QUICK_TO_COMPILE])
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
# Programs are compiled once, not once a worker and a run; commands that tests start inherit it.
CACHE = Path(__file__).parents[1] / ".cache" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Where in the source an operation is from: no test asks, and every stack would be written down.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# JAX reads all this when it is imported: nothing above may import it.
from tests.type_checks import check_types  # noqa: E402

check_types("dials_jax")

import chex  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jaxtyping import config as jaxtyping_config  # noqa: E402

from dials_jax import trees  # noqa: E402
from dials_jax.compiling import forget_programs  # noqa: E402
from dials_jax.config import (  # noqa: E402
    ArithmeticData,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)
from dials_jax.data.arithmetic import ArithmeticTask  # noqa: E402
from dials_jax.models import families, transformer  # noqa: E402
from dials_jax.models.folders import save_model  # noqa: E402
from dials_jax.models.model import Model  # noqa: E402
from dials_jax.nn import gates  # noqa: E402
from dials_jax.nn.eight_bits import quantise_modules  # noqa: E402
from dials_jax.reporting import figure, sweep_report  # noqa: E402
from dials_jax.skipping.routed import init_routers  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
PDF_FONTS = figure.STYLE["pdf.fonttype"]
figure.STYLE["pdf.fonttype"] = 3  # cutting fonts to the letters used takes half of all drawing
gates.FEWEST_TOKENS = 1  # rows of tests are short, and would all be computed together

# Collecting garbage went over all that JAX has traced and compiled: a tenth of the tests' time.
gc.freeze()
gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish():
    """pytest ends with five collections of all garbage, which would go over everything again."""
    gc.freeze()


new_context = mlir.make_ir_context
common_context = functools.cache(new_context)


def ir_context():
    """One for all programs: to make one takes half of the time of a program of one operation.

    A program that is made while another is lowered would be written into that one.
    """
    try:
        within = mlir.ir.Context.current is not None
    except ValueError:
        within = False
    return new_context() if within else common_context()


mlir.make_ir_context = ir_context

MASK, EOS, PAD = 63, 1, 0
# Every compiled program takes some of the 65,530 regions of memory that Linux gives a process;
# without any left, the compiler crashes.
MAX_REGIONS = 40_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets what modules before this one compiled, once it has become much."""
    forget_many_programs()


def forget_many_programs():
    regions = Path("/proc/self/maps")
    if regions.exists() and regions.read_bytes().count(b"\n") > MAX_REGIONS:
        forget_programs()
        jax.clear_caches()
        common_context.cache_clear()
        gc.collect()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)`: a folder that `make(folder)` fills, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of this run, but of all its workers

    def made(name, make):
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


def small_config(**changes):
    """Four layers over a vocabulary of 64."""
    values = {
        "num_layers": 4, "d_model": 32, "vocab_size": 64, "mask_id": MASK, "eos_id": EOS,
        "pad_id": PAD, "head_dim": 8, "max_length": 64, "dtype": "float32",
    }  # fmt: skip
    return families.llada_small(**(values | changes))


jitted_init = jax.jit(transformer.init, static_argnums=0)
jitted_init_routers = jax.jit(init_routers, static_argnums=(0, 1, 2))


def init_params(cfg, seed=0):
    """Random parameters as NumPy arrays, which tests change without compiling anything."""
    return jax.device_get(jitted_init(cfg, jax.random.key(seed)))


def amplify(params, factor):
    """Weights so large that sequences, tokens and layers differ; those of norms stay."""
    params = jax.device_get(params)
    return trees.map_named(lambda name, x: x if "norm" in name else factor * x, params)


@functools.partial(jax.jit, static_argnums=1)
def jitted_quantise(params, kind):
    quantise = functools.partial(quantise_modules, name=kind)
    layers = jax.vmap(quantise)(params["layers"])
    return {"layers": layers, **quantise({"head": params["head"]})}


def in_eight_bits(params, kind):
    """The same parameters, layers stacked, with the weights of layers and head in 8 bits."""
    return {**params, **jitted_quantise({k: params[k] for k in ("layers", "head")}, kind)}


def silence(params, *ids):
    """The same parameters, whose head has logit 0 for these tokens."""
    kernel = np.array(params["head"]["kernel"])
    kernel[:, list(ids)] = 0.0
    return {**params, "head": {**params["head"], "kernel": kernel}}


def random_routers(cfg, seed=0, d_hidden=8):
    """Routers whose tokens really disagree: a random vote layer, not the zero it starts from."""
    router = RouterConfig(d_hidden=d_hidden, execute_bias=0.0)
    routers = jitted_init_routers(cfg.d_model, cfg.num_layers, router, jax.random.key(seed))
    noise = jax.random.normal(jax.random.key(seed + 1), routers["vote"].shape)
    return {**routers, "vote": 20.0 * noise}


@pytest.fixture
def untyped():
    """Calls as users make them: nothing checks the types."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def traced_once(monkeypatch):
    """`traced_once(module, name)`: from here on that function is traced for one program only."""
    chex.clear_trace_counter()

    def limit(module, name):
        once = getattr(module, name).traced_anew(chex.assert_max_traces(n=1))
        monkeypatch.setattr(module, name, once)

    return limit


@pytest.fixture(scope="session")
def cfg():
    return small_config()


@pytest.fixture(scope="session")
def model(cfg):
    return Model(cfg, init_params(cfg))


@pytest.fixture(scope="session")
def lively(model):
    """The same with larger weights. It never says [MASK]."""
    return Model(model.config, silence(amplify(model.params, 8), MASK))


@pytest.fixture(scope="session")
def routers(cfg):
    return random_routers(cfg)


def save_arithmetic_model(folder, seed=0, **changes):
    """A random model over the characters of the arithmetic task, as training leaves it."""
    tokenizer = ArithmeticTask(ArithmeticData()).tokenizer
    tokenizer.save(folder)
    cfg = small_config(vocab_size=19, mask_id=18, max_length=32, **changes)
    params = init_params(cfg, seed)
    save_model(folder / "model", cfg, params, tokenizer_files=[folder / "tokenizer.json"])
    return folder


@pytest.fixture(scope="session")
def arithmetic_model(tmp_path_factory):
    """The folder of a small random model that knows the arithmetic task's characters."""
    return save_arithmetic_model(tmp_path_factory.mktemp("arithmetic"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """The same with other weights."""
    return save_arithmetic_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def draw_only(monkeypatch):
    """`draw_only(*names)`: sweeps draw no other figures. Drawing is slow."""
    figures = sweep_report._figures

    def only(*names):
        def chosen(*args):
            return [figure for figure in figures(*args) if figure.name in names]

        monkeypatch.setattr(sweep_report, "_figures", chosen)

    return only


@pytest.fixture
def without_plots(draw_only):
    """What is drawn is tested beside the plots."""
    draw_only()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, still open to inspection."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def record(figure, *args, **kwargs):
        if figure not in figures:  # a figure is written as PNG and as PDF
            figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


@pytest.fixture
def train_config():
    """Makes configurations of a few training steps on the arithmetic task."""

    def make(backbone="", **changes):
        model = small_config(num_layers=2, vocab_size=19, mask_id=18, max_length=32)
        values = {
            "backbone": str(backbone),
            "model": None if backbone else model,
            "router": RouterConfig(d_hidden=8, execute_bias=0.5),
            "data": ArithmeticData(num_items=200),
            "optimizer": OptimizerConfig(learning_rate=1e-2, num_steps=6, warmup_steps=1),
            "batch_size": 8,
            "log_every": 2,
            "save_every": 6,  # a save takes a third of such a training
        }
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture
def interpreted():
    """Kernels of Hopper GPUs run in an interpreter."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"jax {jax.__version__} has no interpreter for kernels of Mosaic GPU")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
