"""The sources of a study's samples: they are drawn and stored, or read to be scored again.

A source describes its models (`facts`, by letter) and gives batches of samples. So samples can be
drawn on one machine and scored on another one later, without the models that drew them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dials_jax import sharding
from dials_jax.config import SamplingStudy, to_dict
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.errors import InputError, nearest, require
from dials_jax.estimates import RunEstimate, activation_bytes, device_bytes, generation_flops
from dials_jax.evaluation.perplexity import unigram_entropy
from dials_jax.files import read_json, replacing, write_json
from dials_jax.keys import fold_in_each, seed_key
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.records import RECORDS, require_numbers, require_sound
from dials_jax.reporting.environment import command, environment
from dials_jax.reporting.publish import file_name
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.policies import Static
from dials_jax.studies.study_records import read_records

EXAMPLE_CHARACTERS = 600  # of the first sample of each schedule, for the report
SAMPLES_FOLDER = "samples"  # in a study's workdir: models.json, and an array per batch
# Settings that samples depend on, besides the weights.
DRAWING_FIELDS = ("static_layers", "length", "steps", "num_samples", "precision", "dtype", "seed")


class SampleBatch(NamedTuple):
    """Samples of one schedule, and their record before they are scored."""

    tokens: Int[np.ndarray, "B T"]
    record: dict[str, Any]  # schedule, first, entropy, nfe, flops, seconds, perhaps an example


Batches = dict[int, dict[str, Any]]  # records of one schedule, by number of their first sample


def check_batch_record(record: Any) -> None:
    """Checks the record of a batch.

    Raises: ValueError, TypeError or KeyError for anything else.
    """
    if type(record["schedule"]) is not str or type(record["first"]) is not int:
        raise TypeError("schedule is no text, or first no number")
    for name in ("nll", "weight", "entropy"):
        require_numbers(record[name], len(record["nll"]))
    if not record["nll"]:
        raise ValueError("no samples")
    require_numbers([record[name] for name in ("seconds", "flops", "nfe")])


def group_by_schedule(records: Iterable[dict[str, Any]]) -> dict[str, Batches]:
    """Groups batches by schedule. A batch that two processes both wrote counts once."""
    found: dict[str, Batches] = {}
    for record in records:
        found.setdefault(record["schedule"], {})[record["first"]] = record
    return found


class SampledSource:
    """Draws samples when they are needed, and stores them.

    Attributes:
      facts: of each model, by letter: path, num_layers, parameters, fingerprint, eos_id, and its
        tokenizer's fingerprint (None where it has none).
      environment: the device, versions and seed of the run that draws them.
    """

    def __init__(self, cfg: SamplingStudy, workdir: str | Path):
        """Loads all models.

        Raises: InputError for models that would stop the study half-way.
        """
        self.cfg, self.folder = cfg, Path(workdir) / SAMPLES_FOLDER
        mesh = sharding.make_mesh(cfg.mesh)
        self.models = {x: load(path, cfg.dtype, mesh, cfg.layout) for x, path in cfg.models}
        self.policies = static_policies(cfg)
        for letter, policy in self.policies.items():
            policy.check(self.models[letter].num_layers)
        first = next(iter(self.models.values()))
        self.tokenizer = _load_tokenizer(first.path, optional=cfg.retokenize == "never")
        tokenizer = self.tokenizer.fingerprint if self.tokenizer else None
        self.facts = {x: model_facts(model, tokenizer) for x, model in self.models.items()}
        self.environment = environment(first, cfg.seed)
        self._described = False

    @property
    def sampler(self) -> Ancestral:
        return Ancestral(self.cfg.length, self.cfg.steps, self.cfg.precision)

    def cost(self, schedules: Sequence[Schedule], count: int) -> RunEstimate:
        """What drawing so many samples takes, of the schedules' mean."""
        models = self.models.values()
        of_letter = {
            letter: generation_flops(model.config, self.sampler, None, 0)
            for letter, model in self.models.items()
        }
        flops = np.mean([sum(s.share(x) * of_letter[x] for x in s.letters) for s in schedules])
        mesh = next(iter(models)).mesh
        batch, length = -(-self.cfg.batch_size // sharding.num_batch_shards(mesh)), self.cfg.length
        memory = {
            "weights": sum(device_bytes(model.params) for model in models),
            "activations": max(activation_bytes(m.config, batch, length, length) for m in models),
        }
        return RunEstimate(count * length, count * float(flops), memory)

    def batch(self, schedule: Schedule, first: int) -> SampleBatch:
        """Draws at most `batch_size` samples, starting with number `first`."""
        cfg = self.cfg
        numbers = np.arange(first, min(first + cfg.batch_size, cfg.num_samples))
        keys = fold_in_each(seed_key(cfg.seed), numbers)
        out = generate(
            self.models,
            None,
            sampler=self.sampler,
            schedule=schedule,
            policy=self.policies,
            key=keys,
            num_sequences=len(numbers),
            fill_to=cfg.batch_size,
        )
        sharding.on_first_process(lambda: self._store(schedule, first, out.tokens))
        record = {
            "schedule": str(schedule),
            "first": first,
            "entropy": unigram_entropy(out.tokens).tolist(),
            "nfe": out.nfe,
            "flops": out.flops.model_total,
            "seconds": out.flops.seconds,
            "tokens": _digest(out.tokens),
        }
        return SampleBatch(out.tokens, record | ({} if first else self._example(out.tokens[0])))

    def _store(self, schedule: Schedule, first: int, tokens: Int[np.ndarray, "B T"]) -> None:
        if not self._described:
            settings = {name: to_dict(self.cfg)[name] for name in DRAWING_FIELDS}
            facts = {"models": self.facts, "config": settings, "environment": self.environment}
            write_json(self.folder / "models.json", facts, digest=True)
            self._described = True
        path = _batch_path(self.folder, schedule, first)
        vocab_size = max(model.config.vocab_size for model in self.models.values())
        with replacing(path) as file:
            np.save(file, tokens.astype(np.min_scalar_type(vocab_size)))

    def _example(self, sample: Int[np.ndarray, "T"]) -> dict[str, str]:
        if self.tokenizer is None:
            return {}
        return {"example": self.tokenizer.decode(sample)[:EXAMPLE_CHARACTERS]}


class StoredSource:
    """Reads the samples of an earlier study, whose models may be gone.

    Attributes: as in `SampledSource`; the environment is that of the run that drew them.
    """

    def __init__(self, cfg: SamplingStudy, schedules: Sequence[Schedule]):
        """Checks that all samples exist.

        Raises: InputError for samples that are missing, or were drawn with other settings.
        """
        workdir = Path(cfg.samples)
        self.folder = workdir / SAMPLES_FOLDER
        require(
            (self.folder / "models.json").is_file(),
            f"{workdir} holds no samples; give the workdir of a study that drew some",
        )
        stored = _read_facts(self.folder / "models.json")
        self.facts: dict[str, dict[str, Any]] = stored["models"]
        _check_same_drawing(cfg, self.facts, stored["config"])
        self.environment = stored["environment"] | {"command": command()}
        self.batches = group_by_schedule(read_records(workdir / RECORDS, check_batch_record))
        for schedule in schedules:
            self._check_schedule(schedule, cfg.num_samples, cfg.length)

    def _check_schedule(self, schedule: Schedule, num_samples: int, length: int) -> None:
        found = 0
        for first, record in self.batches.get(str(schedule), {}).items():
            path = _batch_path(self.folder, schedule, first)
            if path.is_file():
                require(
                    _stored_shape(path) == (len(record["entropy"]), length),
                    f"{path} is damaged; copy it again, or draw the samples again",
                )
                found += len(record["entropy"])
        require(
            found == num_samples,
            f"{self.folder} has {found} of {num_samples} samples of {schedule}; let that study "
            "end first, or leave the schedule out",
        )

    def batch(self, schedule: Schedule, first: int) -> SampleBatch:
        """Reads the batch of samples that starts with number `first`.

        Raises: InputError for samples that changed since they were drawn.
        """
        old, path = self.batches[str(schedule)][first], _batch_path(self.folder, schedule, first)
        tokens = np.load(path).astype(np.int32)
        require(
            old.get("tokens") in (None, _digest(tokens)),  # earlier versions stored no digest
            f"{path} is damaged: it does not hold what was drawn; copy it again, or draw the "
            "samples again",
        )
        return SampleBatch(tokens, {k: v for k, v in old.items() if k not in ("nll", "weight")})


def _read_facts(path: Path) -> dict[str, Any]:
    """Reads models.json.

    Raises: InputError if something in it is missing.
    """
    stored = read_json(path)
    with require_sound(path, "copy it again, or draw the samples again"):
        for facts in stored["models"].values():
            missing = {"path", "num_layers", "fingerprint", "eos_id", "tokenizer"} - facts.keys()
            if missing:
                raise ValueError(f"a model has no {', '.join(sorted(missing))}")
        config = SamplingStudy.upgraded(stored["config"])
        missing = set(DRAWING_FIELDS) - config.keys()
        if missing:
            raise ValueError(f"config has no {', '.join(sorted(missing))}")
        return stored | {"config": config, "environment": dict(stored["environment"])}


def _digest(tokens: Int[np.ndarray, "B T"]) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]


def _check_same_drawing(
    cfg: SamplingStudy, facts: Mapping[str, Any], old: Mapping[str, Any]
) -> None:
    """Raises: InputError for samples that were drawn by other models, or with other settings."""
    letters = {letter for letter, _ in cfg.models}
    require(
        letters == set(facts),
        f"samples: {cfg.samples} was drawn by {', '.join(facts)}, but models names "
        f"{', '.join(letters)}; make them agree",
    )
    new = to_dict(cfg)
    for name in DRAWING_FIELDS:
        require(
            new[name] == old[name],
            f"samples: {cfg.samples} has {name}={old[name]}, but the study {new[name]}; "
            "make them agree",
        )


def _batch_path(folder: Path, schedule: Schedule, first: int) -> Path:
    return folder / f"{file_name(str(schedule))}-{first}.npy"


def _stored_shape(path: Path) -> tuple[int, ...]:
    """The shape of a stored array; () if its file is incomplete."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (ValueError, EOFError):
        return ()


def _load_tokenizer(path: str, optional: bool) -> Tokenizer | None:
    try:
        return load_tokenizer(path)
    except InputError:
        if optional:
            return None
        raise


def model_facts(model: Model, tokenizer: str | None = None) -> dict[str, Any]:
    """Describes a model, as studies record it.

    Args:
      tokenizer: the fingerprint of its tokenizer.
    """
    return {
        "path": model.path,
        "num_layers": model.num_layers,
        "parameters": model.num_parameters,
        "fingerprint": model.fingerprint,
        "eos_id": model.config.eos_id,
        "tokenizer": tokenizer,
    }


def static_policies(cfg: SamplingStudy) -> dict[str, Static]:
    """The policies of the models that skip layers, by letter of the model."""
    return {x: Static([int(n) for n in layers.split(",")]) for x, layers in cfg.static_layers}


def check_schedules(cfg: SamplingStudy, schedules: Sequence[Schedule]) -> None:
    """Raises: InputError for schedules that name unknown models or do not fill the steps."""
    require_known_letters(schedules, [letter for letter, _ in cfg.models])
    for schedule in schedules:
        require(
            schedule.num_steps == cfg.steps,
            f"schedule {schedule} has {schedule.num_steps} steps, but the study "
            f"steps={cfg.steps}; make them agree",
        )


def require_known_letters(schedules: Sequence[Schedule], known: Sequence[str]) -> None:
    """Raises: InputError for a letter that names no model."""
    for schedule in schedules:
        for letter in schedule.letters:
            require(
                letter in known,
                f"schedule {schedule}: no model is called {letter!r}{nearest(letter, known)}",
            )
