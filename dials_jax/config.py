"""Every setting, as frozen dataclasses: hashable, serialisable, checked when made.

A dataclass here is a static argument of `jax.jit`, the content of `config.json` and the schema of
the command line. A function takes the smallest of them that it needs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'd_model'?`, or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(valid)}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be positive")


# --------------------------------------------------------------------------------------- models

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one transformer. Numbers that change the maths have no default."""

    model_type: str = "llada"
    vocab_size: int  # rows of the embedding and of the head
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int  # width of the SwiGLU
    max_length: int  # positions the model was trained for
    rope_theta: float
    norm_eps: float
    qkv_bias: bool = False  # biases on the query, key and value projections
    bias: bool = False  # biases on every other projection, the head included
    causal: bool = False  # a token sees itself and what is to its left only
    shift: bool = False  # the head's row i predicts token i + 1 (Dream); `apply` undoes it
    mask_id: int | None  # id of [MASK]; None for a causal model that has none
    eos_id: int | None  # end of text; None for a causal model that has none
    pad_id: int
    eot_id: int | None = None  # end of turn, where the tokenizer has one
    dtype: str = "bfloat16"  # activations; norms, softmax, angles and logits stay float32

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        require_positive(self, *sizes, "d_ff", "max_length", "rope_theta", "norm_eps")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary halves")
        require(self.dtype in DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        for name in ("mask_id", "eos_id", "pad_id", "eot_id"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.vocab_size,
                f"{name}={value} is outside the vocabulary of {self.vocab_size} tokens",
            )
            require(
                value is not None or self.causal or name == "eot_id",
                f"{name} is missing; only a causal model can do without",
            )
        require(
            not (self.causal and self.shift),
            "shift=True is for models that fill in [MASK]; a causal model predicts the next token",
        )

    def require_mask(self) -> None:
        """Raises: InputError for a causal model, which has no [MASK] to fill in."""
        require(
            not self.causal,
            f"a causal model ({self.model_type}) fills in no [MASK]; give a masked diffusion model",
        )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One DIALS router before every layer (DIALS, section 3.2)."""

    d_hidden: int = 512
    threshold: float = 0.1  # tau: skip a layer when a larger share of masked tokens votes so
    temperature: float = 1.0  # of the Gumbel-softmax
    execute_bias: float = 3.0  # first bias of the vote to execute; sigmoid(-3) = 4.7 % skip

    def __post_init__(self):
        require(0 <= self.threshold < 1, f"threshold={self.threshold} must lie in [0, 1)")
        require_positive(self, "d_hidden", "temperature")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(sizes.count(-1) <= 1, f"mesh {sizes}: at most one axis may be -1")
        require(all(s == -1 or s > 0 for s in sizes), f"mesh {sizes}: sizes are positive or -1")


# --------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Documents packed end to end into rows of `length` tokens."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...] = ()  # .txt, .jsonl or .jsonl.xz files, or folders of them
    tokenizer: str = ""  # a tokenizer.json, or a folder with one or with vocab.json and merges.txt
    length: int = 1024
    prompt_length: int = 0  # tokens at the front that are never masked
    random_length_prob: float = 0.01  # rows cut to U{1..length}, as LLaDA does (appendix B.1)
    cache: str = ".cache/dials_jax"  # packed tokens are kept here


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Prompt/answer pairs from JSONL. Fields enter templates as `{name}` or `{name.inner}`."""

    kind: Literal["task"] = "task"
    paths: tuple[str, ...] = ()
    tokenizer: str = ""
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    prompt_length: int = 512  # longest prompt in tokens; prompts are padded on the left
    answer_length: int = 256  # longest answer in tokens, end of text included
    pad_answer: bool = True  # fill the answer with end-of-text tokens and train on them (LLaDA SFT)
    too_long: Literal["error", "drop"] = "error"


@dataclass(frozen=True, kw_only=True)
class ArithmeticData:
    """The procedural task of the demo: reversals, maxima, sorted digits; sums are harder."""

    kind: Literal["arithmetic"] = "arithmetic"
    operations: tuple[str, ...] = ("reverse", "max", "sort")
    digits: int = 2
    num_items: int = 20_000  # distinct training items
    split_seed: int = 0  # decides which items are held out


Data = TextData | TaskData | ArithmeticData


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then half a cosine to `final_scale` (DIALS, appendix A.1)."""

    learning_rate: float = 5e-5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    final_scale: float = 0.0
    num_steps: int | None = None  # give steps or epochs, not both
    num_epochs: float | None = None
    warmup_steps: int | None = None
    warmup_epochs: float | None = None

    def __post_init__(self):
        for unit in ("num", "warmup"):
            given = [getattr(self, f"{unit}_{u}") is not None for u in ("steps", "epochs")]
            require(
                sum(given) == 1,
                f"optimizer: give exactly one of {unit}_steps and {unit}_epochs",
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a training step minimises."""

    min_ratio: float = 1e-3  # mask ratios are uniform between this and 1
    skip_weight: float = 1.0  # lambda (DIALS, equation 10); routers only
    target_skip_rate: float = 0.5  # alpha_target
    scale_skip_by_mask_ratio: bool = True  # False: the unscaled ablation of DIALS, figure 4

    def __post_init__(self):
        require(0 < self.min_ratio <= 1, f"min_ratio={self.min_ratio} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: `backbone` empty trains a model, otherwise routers for that backbone."""

    backbone: str = ""  # a checkpoint or Hugging Face folder; it stays frozen
    model: ModelConfig | None = None  # the model to train from scratch
    router: RouterConfig = RouterConfig()
    data: Data
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 64  # rows a step over all devices and microbatches
    num_microbatches: int = 1
    remat: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self):
        require(
            bool(self.backbone) != (self.model is not None),
            "give either backbone= (train routers on it) or model= (train from scratch)",
        )
        require_positive(self, "batch_size", "num_microbatches", "log_every", "save_every")
        require_positive(self, "keep_checkpoints")
        require(
            self.batch_size % self.num_microbatches == 0,
            f"batch_size={self.batch_size} must be divisible by "
            f"num_microbatches={self.num_microbatches}",
        )


# --------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """One evaluation task. `metric` decides how items are scored."""

    name: str
    metric: Literal["exact_match", "choice", "nelbo"]
    data: Data
    choices: tuple[str, ...] = ()  # templates, one a choice ("{sol1}", "{sol2}")
    choice_list: str = ""  # or one field that holds a list ("choices.text")
    label: str = "label"  # field with the index, or with the name, of the right choice
    label_names: str = ""  # field that lists the choices' names ("choices.label")
    extract: str = ""  # regular expression; its last match is compared, in answer and output
    limit: int | None = None  # first items only
    num_samples: int = 128  # Monte-Carlo masks an item (choice, nelbo)
    steps: int | None = None  # denoising steps (exact_match); default: one a token
    block_length: int | None = None  # default: one block
    cfg_scale: float = 0.0
    threshold: float | None = None  # reveal all tokens of this confidence (exact_match)
    factor: float | None = None  # or as many as are confident together (exact_match)
    delay_eos: bool = False  # no end of text after a masked token (exact_match)
    stop_at_eos: bool = False  # a row ends at its end of text (exact_match)
    cache: str = "none"  # or prefix, dual, es-PROMPT-BLOCK such as es-64-4 (exact_match)
    bucket: int = 64  # lengths are padded to multiples of this
    max_programs: int = 4  # lengths, or shapes of prompt and answer, that are compiled

    def __post_init__(self):
        require_positive(self, "num_samples", "bucket", "max_programs")
        for name in ("threshold", "factor", "delay_eos", "stop_at_eos", "cache"):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            require(
                self.metric == "exact_match" or value == default,
                f"task {self.name!r}: {name}={value!r} is for generation, but metric "
                f"{self.metric!r} generates nothing; leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A sweep of policies over tasks."""

    model: str
    routers: tuple[str, ...] = ()  # workdirs of router training, one a lambda
    tasks: tuple[EvalTask, ...] = ()
    static: tuple[int, ...] = (1, 2, 3, 4)  # numbers of layers to skip; layers by Algorithm 1
    random: tuple[int, ...] = (1, 2, 3, 4)
    similarity_threshold: float | None = None  # tau of Algorithm 1 (0.95 in Goel et al.)
    num_calibration: int = 64  # prompts whose similarities choose the static layers
    threshold: float | None = None  # overrides the routers' own
    batch_size: int = 32
    mesh: MeshConfig = MeshConfig()
    layout: Literal["stacked", "unrolled", "fused", "auto"] = (
        "stacked"  # stacked compiles much faster
    )
    dtype: str | None = None
    seed: int = 0


# --------------------------------------------------------------------------------------- JSON


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The inverse of `to_dict`.

    Raises: InputError for an unknown or missing field, naming the nearest valid one.
    """
    hints = typing.get_type_hints(cls)
    prefix = f"{where}: " if where else ""
    for name in values:
        require(name in hints, f"{prefix}unknown field {name!r}{nearest(name, hints)}")
    for f in dataclasses.fields(cls):
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING,) * 2
        require(has_default or f.name in values, f"{prefix}field {f.name!r} is missing")
    return cls(**{name: _parse(hints[name], v, f"{where}.{name}") for name, v in values.items()})


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(args, value, where)
    if origin is tuple:
        return tuple(_parse(args[0], v, where) for v in value)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where.lstrip("."))
    return value


def _parse_union(options: tuple, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    if len(classes) == 1:
        return from_dict(classes[0], value, where.lstrip("."))
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    kind = value.get("kind")
    require(kind in kinds, f"{where}: unknown kind {kind!r}{nearest(str(kind), kinds)}")
    return from_dict(kinds[kind], value, where.lstrip("."))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: InputError if the file is missing or holds none."""
    path = Path(path)
    require(path.is_file(), f"{path} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not valid JSON: {error}") from error
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return values


def write_json(path: str | Path, values: Any) -> None:
    """Writes through a temporary file, so a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
