"""Settings of lm-evaluation-harness: the model that it evaluates, and the tasks.

The harness itself gives settings as texts, `path=models/llada-8b,router=runs/r,cache=dual`, and a
configuration file of `eval.py` gives a `HarnessConfig`. Both become a `HarnessModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dials_jax import sharding
from dials_jax.caching.parse import parse_cache
from dials_jax.config import EightBits, Layout, MeshConfig, Place, Typed, WeightDtype, shown
from dials_jax.config.typed import field_hints
from dials_jax.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from dials_jax.errors import nearest, require
from dials_jax.evaluation.answer_store import AnswerSettings
from dials_jax.evaluation.task import SamplerConfig
from dials_jax.loading import find_model, load, read_config
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.block_diffusion import BlockDiffusion
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.storage import load_router

DEFAULT_LENGTH = 256  # tokens generated where neither the task nor the model arguments say
SAMPLERS = {
    "confidence": Confidence,
    "dream": Dream,
    "ancestral": Ancestral,
    "autoregressive": Autoregressive,
    "block_diffusion": BlockDiffusion,
}


@dataclass(frozen=True, kw_only=True)
class HarnessModel(AnswerSettings):
    """A model, what it leaves out, and how it answers the harness."""

    path: Place
    tokenizer: Place = ""  # file or folder; "" is the model's
    sampler: SamplerConfig | None = None  # None: Confidence, 256 tokens, ends at end of text
    router: Place = ""  # workdir of router training
    skip_threshold: float | None = None  # overrides the router's own
    execution_ratio: float | None = None  # or: its thresholds that were fitted to this share
    static: tuple[int, ...] = ()  # layers that are left out, counted from 0
    num_random: int = 0  # layers that are left out at random
    dtype: WeightDtype | None = None
    weights: EightBits | None = None  # in 8 bits: layers and head; None: as stored
    batch_invariant: bool = False  # bitwise the same answers in any batch: see `dials_jax.load`
    layout: Layout = "auto"
    mesh: MeshConfig = MeshConfig()
    store: Place = ""  # folder where answers are kept; "": in memory (eval.py: in the workdir)

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in ("router", "static", "num_random") if getattr(self, name)]
        require(len(given) < 2, f"{' and '.join(given)} are several policies; give one of them")
        for name in ("skip_threshold", "execution_ratio"):
            alone = getattr(self, name) is not None and not self.router
            require(not alone, f"{name} is of a router; give router, too")


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(Typed):
    """An evaluation by lm-evaluation-harness; fields are as in its `simple_evaluate`."""

    model: HarnessModel
    tasks: tuple[str, ...]
    num_fewshot: int | None = None  # None: the task's own
    limit: int | None = None  # first items of every task only
    # Folder of task files. They name Python code, which runs as soon as the task is loaded.
    include_path: Place = ""
    include_defaults: bool = True  # False: the tasks of include_path only, which starts faster
    gen_kwargs: str = ""  # as "max_gen_toks=512,do_sample=False"; added to those of the tasks
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str = ""
    fewshot_seed: int = 1234  # which examples stand in the prompts
    bootstrap_iters: int = 100_000  # for standard errors of metrics without a formula
    confirm_run_unsafe_code: bool = False  # for tasks that run generated programs

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.tasks), "tasks is empty; name tasks of lm-eval, such as ('gsm8k',)")
        require(
            self.limit is None or self.limit > 0, f"limit={self.limit} must be positive, or None"
        )
        require(
            self.apply_chat_template or not self.fewshot_as_multiturn,
            "fewshot_as_multiturn needs apply_chat_template=True",
        )


def parse_model_arguments(arguments: Mapping[str, Any]) -> HarnessModel:
    """Reads the model arguments of the harness's command line.

    They are the fields of `HarnessModel`, and those of the sampler by their own names:
    `path=...,cache=dual,sampler=dream,steps=128,temperature=0.1`. `cfg_scale` guides both
    likelihoods and generation, as in LLaDA's script.

    Raises: InputError for an unknown name, naming the nearest valid one.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    kind = str(given.pop("sampler", "confidence"))
    require(kind in SAMPLERS, f"sampler={kind!r} is not known{nearest(kind, SAMPLERS)}")
    own, of_sampler = field_hints(HarnessModel), field_hints(SAMPLERS[kind])
    for name in given:
        _require_known(name, kind, {*own, *of_sampler} - {"mesh"})
    require("path" in given, "model arguments: path is missing; give path=FOLDER")
    if "cache" in given:
        given["cache"] = parse_cache(str(given["cache"]))
    if "static" in given:
        given["static"] = _layers(given["static"])
    settings = {name: value for name, value in given.items() if name in of_sampler}
    return HarnessModel(
        **{name: value for name, value in given.items() if name in own},
        sampler=make_sampler(kind, settings),
    )


def make_sampler(kind: str = "confidence", settings: Mapping[str, Any] | None = None) -> Any:
    """A sampler with these settings; it ends early where it can, and generates 256 tokens."""
    cls = SAMPLERS[kind]
    length_field = next(iter(field_hints(cls)))
    defaults: dict[str, Any] = {length_field: DEFAULT_LENGTH}
    if cls is BlockDiffusion:
        defaults["block_length"] = 32
    if cls in (Confidence, BlockDiffusion):
        defaults["stop_at_eos"] = True  # changes nothing before the end of text
    settings = defaults | dict(settings or {})
    if cls is Ancestral:
        settings.setdefault("steps", settings[length_field])
    return cls(**settings)


def _require_known(name: str, kind: str, valid: set[str]) -> None:
    others = [k for k, cls in SAMPLERS.items() if name in field_hints(cls)]
    hint = f" of sampler={kind}; it is one of sampler={others[0]}" if others else ""
    require(name in valid, f"unknown model argument {name!r}{hint or nearest(name, valid)}")


def _layers(value: Any) -> Any:
    """Layers as the command line gives them: 7, [7, 9], or 7+9 where commas separate arguments."""
    if isinstance(value, str):
        parts = value.split("+")
        require(
            all(part.strip().isdecimal() for part in parts),
            f"static={shown(value)}: give layers from 0, as static=7+9",
        )
        return tuple(map(int, parts))
    return (value,) if isinstance(value, int) else tuple(value)


def load_harness_model(cfg: HarnessModel) -> tuple[Model, Tokenizer, Policy | None]:
    """Loads the model, its tokenizer, and its policy.

    Raises: InputError for what is missing or does not fit the model.
    """
    mesh = sharding.make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(tokenizer_path(cfg))
    check_tokenizer(tokenizer, read_config(cfg.path, cfg.dtype))  # before the weights
    model = load(cfg.path, cfg.dtype, mesh, cfg.layout, cfg.weights, cfg.batch_invariant)
    return model, tokenizer, load_policy(cfg, model)


def load_policy(cfg: HarnessModel, model: Model) -> Policy | None:
    """The policy that the settings name; None runs all layers.

    Raises: InputError for one that does not fit the model.
    """
    if cfg.router:
        return load_router(
            cfg.router, model, cfg.skip_threshold, execution_ratio=cfg.execution_ratio
        )
    if cfg.static:
        static = Static(cfg.static)
        static.check(model.num_layers)
        return static
    if cfg.num_random:
        require(
            0 < cfg.num_random < model.num_layers,
            f"num_random={cfg.num_random}: cannot skip as many of {model.num_layers} layers",
        )
        return Random(cfg.num_random)
    return None


def tokenizer_path(cfg: HarnessModel) -> Path:
    """The file or folder of the tokenizer; its folder may have chat templates."""
    model = find_model(cfg.path)[0]
    return Path(cfg.tokenizer).expanduser() if cfg.tokenizer else model
