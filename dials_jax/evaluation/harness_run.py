"""Runs lm-evaluation-harness as `eval.py` does: settings from a file, results in a workdir."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from dials_jax import sharding
from dials_jax.config import to_dict
from dials_jax.errors import require
from dials_jax.evaluation.harness import HarnessConfig
from dials_jax.evaluation.lm_eval import DialsLM
from dials_jax.files import replacing, write_json
from dials_jax.stopping import ending_together
from dials_jax.workdir import exclusive, require_unclaimed

HARNESS_MARK = "harness.json"  # marks a workdir of the harness; its settings
# Fields of HarnessConfig that `simple_evaluate` has under the same name.
_PASSED_ON = (
    "num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn", "bootstrap_iters",
    "confirm_run_unsafe_code",
)  # fmt: skip


def run_harness(cfg: HarnessConfig, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the tasks; writes results.json, and samples/TASK.jsonl with every answer.

    Answers are kept in the workdir as they come. The same call continues one that was stopped, and
    a call with other settings uses the answers that these do not concern.

    Raises: InputError before the model is loaded for tasks that the harness does not have.
    """
    with exclusive(workdir) as workdir, ending_together():
        require_unclaimed(workdir, HARNESS_MARK, ("results.json", "samples", "answers"))
        manager = TaskManager(
            include_path=cfg.include_path or None, include_defaults=cfg.include_defaults
        )
        for task in cfg.tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `dials-lm-eval ls tasks`"
            require(bool(manager.match_tasks([task])), f"lm-eval has no task {task!r}; {hint}")
        sharding.on_first_process(
            lambda: write_json(workdir / HARNESS_MARK, to_dict(cfg), digest=True)
        )
        store = cfg.model.store or str(workdir / "answers")
        lm = DialsLM.load(replace(cfg.model, store=store))
        results = simple_evaluate(
            lm,
            tasks=list(cfg.tasks),
            task_manager=manager,
            batch_size=cfg.model.batch_size,
            gen_kwargs=cfg.gen_kwargs or None,
            system_instruction=cfg.system_instruction or None,
            fewshot_random_seed=cfg.fewshot_seed,
            **{name: getattr(cfg, name) for name in _PASSED_ON},
        )
        sharding.on_first_process(lambda: _write(results, workdir))
        return results


def _write(results: dict[str, Any], workdir: Path) -> None:
    for task, samples in results["samples"].items():
        lines = [json.dumps(sample, default=handle_non_serializable) for sample in samples]
        with replacing(workdir / "samples" / f"{task}.jsonl") as file:
            file.writelines(line.encode() + b"\n" for line in lines)
    rest = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(rest, default=handle_non_serializable)
    write_json(workdir / "results.json", json.loads(text), digest=True)
    print(make_table(results))
    print(f"results: {workdir / 'results.json'}")
