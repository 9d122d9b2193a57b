"""Answers that are kept: on disk or in memory, apart for everything that they depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from dials_jax import digests
from dials_jax.config import Seed, Typed, require_positive
from dials_jax.errors import require
from dials_jax.evaluation.batched import check_num_samples
from dials_jax.evaluation.tally import LayerCounts, Record
from dials_jax.evaluation.task import CacheConfig
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy, policy_name
from dials_jax.records import Records, require_numbers
from dials_jax.skipping.flops import KEYS as FLOPS_KEYS
from dials_jax.workdir import exclusive

# Settings that came later. At their defaults they are left out, so that answers are found that were
# kept before.
LATER_SETTINGS = (
    "stop_ids",
    "append_blocks",
    "end_think_ids",
    "end_think_boost",
    "end_think_power",
)
ANSWER_RULES = 1  # raised where answers change under equal settings: kept ones are then not read
SETTINGS_FILE = "settings.json"  # in a folder of kept answers: what they depend on
BATCHING = ("batch_size", "bucket", "max_programs")  # settings that change no answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings(Typed):
    """How requests are answered, beside the model, its policy and the sampler."""

    cache: CacheConfig | None = None  # of generation
    num_samples: int = 128  # masked copies per likelihood
    cfg_scale: float = 0.0  # guidance of likelihoods; samplers have their own
    too_long: Literal["error", "cut"] = "error"  # cut: long prompts lose tokens on the left
    seed: Seed = 0
    batch_size: int = 32
    bucket: int = 64  # lengths are padded to multiples of this
    max_programs: int = 4  # lengths, or shapes of prompt and answer, that are compiled

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_samples", "batch_size", "bucket", "max_programs")
        check_num_samples(self.num_samples)
        require(self.cfg_scale >= 0, f"cfg_scale={self.cfg_scale} must not be negative")


class AnswerStore:
    """The records of answers of one model under one policy.

    Attributes:
      identity: everything that answers depend on, but the sampler.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy | None,
        settings: AnswerSettings,
        folder: str | Path | None,
    ):
        """Args: folder: gets a folder for each set of settings; None: all are in memory."""
        self.folder = None if folder is None else Path(folder)
        self._num_layers = model.num_layers
        self._in_memory: dict[str, InMemory] = {}
        self._facts = {
            "rules": ANSWER_RULES,
            "weights": model.fingerprint,
            "dtype": model.config.dtype,
            "policy": [policy_name(policy), policy_digest(policy)],
            "seed": settings.seed,
            **({"batch_invariant": True} if model.batch_invariant else {}),
        }
        values = vars(settings).items()
        self.identity = self._facts | {n: plain_settings(x) for n, x in values if n not in BATCHING}

    @contextlib.contextmanager
    def open(self, kind: str, facts: Mapping[str, Any]) -> Iterator[Records | InMemory]:
        """The records under one set of settings, locked for this process while they are open.

        Args:
          facts: what answers of this kind depend on, beside model, policy and seed.
        """
        identity = {"kind": kind, **self._facts, **facts}
        name = f"{kind}-{digest_text(json.dumps(identity, sort_keys=True))[:16]}"
        if self.folder is None:
            yield self._in_memory.setdefault(name, InMemory())
            return
        with exclusive(self.folder / name, "store") as folder:
            yield Records(folder, identity, self._check, SETTINGS_FILE, _agree)

    def _check(self, record: Any) -> None:
        """Raises: a plain error for what is no record of answers."""
        for name, *numbers in record["scores"]:
            if not isinstance(name, str):
                raise TypeError(f"{str(name)[:40]} is no name")
            require_numbers(numbers, 3)
        dict(record.get("examples", {}))
        require_numbers([record["flops"][key] for key in FLOPS_KEYS.values()], len(FLOPS_KEYS))
        LayerCounts(self._num_layers).add_stored(record["execution"])


class InMemory:
    """Stands for `Records` where nothing is written."""

    def __init__(self):
        self.all: list[Record] = []

    def add(self, record: Record) -> None:
        self.all.append(record)


def _agree(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The folder's name is a digest of its settings, so others can only have been put there."""
    require(
        old == new, f"{folder / SETTINGS_FILE} was changed; remove {folder}, or name another store"
    )
    return new


def policy_digest(policy: Policy | None) -> str:
    """Tells policies apart: by their settings, and by the bits of their arrays."""
    leaves, structure = jax.tree.flatten(policy)
    bits = digests.digest_hex(dict(enumerate(leaves)))
    return digest_text(f"{structure} {json.dumps(bits)}")[:16]


def plain_settings(settings: Any) -> Any:
    """A sampler or cache as JSON values."""
    if dataclasses.is_dataclass(settings):
        default = {x.name: x.default for x in dataclasses.fields(settings)}
        values = dataclasses.asdict(settings).items()
        values = {n: x for n, x in values if n not in LATER_SETTINGS or x != default[n]}
        return {"kind": type(settings).__name__, **values}
    return settings if isinstance(settings, int | float | str | None) else repr(settings)


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
