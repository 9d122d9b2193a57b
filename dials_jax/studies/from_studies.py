"""Reads what one study needs from the workdir of another, finished one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dials_jax.config import SearchStudy, from_dict
from dials_jax.errors import require
from dials_jax.files import read_json
from dials_jax.records import RECORDS, require_numbers, require_sound
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.studies import search
from dials_jax.studies.perplexity_run import join_batches
from dials_jax.studies.placements import Placements
from dials_jax.studies.samples import check_batch_record, group_by_schedule
from dials_jax.studies.study_records import read_records

RERUN = "run that study again: it writes its results again from its records"
HARM_CURVES = ("gap", "kl", "relative_kl")  # curves of an importance study that predict harm


def placements_of(cfg: SearchStudy) -> Placements:
    """All placements of a search's light segments."""
    return Placements(cfg.num_segments, cfg.num_light)


def coarse_schedule(cfg: SearchStudy, number: int) -> Schedule:
    """The schedule of one placement of the light segments."""
    chosen = placements_of(cfg).chosen(number)
    return Schedule.coarse(cfg.num_segments, chosen, cfg.steps, cfg.light, cfg.heavy)


def coarse_schedules(cfg: SearchStudy) -> list[Schedule]:
    """The schedules of all placements, in their order."""
    return [coarse_schedule(cfg, number) for number in range(cfg.num_schedules)]


def read_harms(
    workdir: str | Path, letter: str, num_segments: int
) -> dict[str, Float[np.ndarray, "n"]]:
    """Reads an importance study: per curve of one model, the predicted harm of each segment.

    Raises: InputError for a workdir without such a study, or a model that it did not measure.
    """
    path = Path(workdir) / "results.json"
    results = read_json(path)
    require(
        results.get("kind") == "ImportanceStudy",
        f"{workdir} holds no importance study; give the workdir of one that ended",
    )
    found = {}
    with require_sound(path, RERUN):
        for name in HARM_CURVES:
            by_letter = results["curves"].get(name, {})
            require(
                not by_letter or letter in by_letter,
                f"{workdir} measured {', '.join(by_letter)} but not {letter!r}; measure that model",
            )
            if by_letter:
                points = by_letter[letter]
                require_numbers(points["value"], len(points["times"]))
                times, values = (np.array(points[x], float) for x in ("times", "value"))
                found[name] = search.segment_harm(times, values, num_segments)
    return found


def read_search(workdir: str | Path) -> tuple[SearchStudy, Float[np.ndarray, "S N"]]:
    """Reads a finished search: its settings, and the values of its schedules by placement.

    Raises: InputError for a workdir without a search, or with an unfinished one.
    """
    path = Path(workdir) / "results.json"
    results = read_json(path)
    require(
        results.get("kind") == "SearchStudy",
        f"{workdir} holds no search; give the workdir of a SearchStudy that ended",
    )
    with require_sound(path, RERUN):
        cfg = from_dict(SearchStudy, results["config"])
    batches_of = group_by_schedule(read_records(Path(workdir) / RECORDS, check_batch_record))
    values = []
    for schedule in coarse_schedules(cfg):
        batches = batches_of.get(str(schedule), {})
        count = sum(len(record["nll"]) for record in batches.values())
        require(
            count >= cfg.num_samples,
            f"{workdir} has {count} of {cfg.num_samples} samples of {schedule}; let an exhaustive "
            "search end first",
        )
        values.append(join_batches(batches).values(cfg.aggregate))
    return cfg, np.stack(values)
