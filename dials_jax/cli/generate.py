"""Answers prompts of any lengths by a model.

dials generate MODEL --prompt "1 + 1 ="
dials generate MODEL --file prompts.jsonl --chat --router runs/router --out answers.jsonl
dials generate MODEL --batch-size 64 --cache dual --compile-for v5e:2x2 --mesh.tensor 4

A line of prompts.jsonl is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.
Answers are written as they come. A run that was stopped or killed continues with the same command;
with other settings it is refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from dials_jax.cli.options import Options, add_model_options, add_sampling_options
from dials_jax.commands import keep_programs
from dials_jax.errors import require
from dials_jax.files import file_to_write
from dials_jax.stopping import keeping

LESS_MEMORY = "lower --batch-size, or give a larger mesh, as --mesh.tensor 4"


def generate_command(argv: list[str] | None = None) -> None:
    """Answers the prompts, and says what they cost."""
    given = generate_options().read(argv)
    check_generate(given)
    if given.compile_for is not None:
        return fit_generation(given)
    prompts = read_prompts(given)
    keep_programs()
    from dials_jax.answer_file import open_answers
    from dials_jax.cli.open_model import open_model
    from dials_jax.estimates import print_cost
    from dials_jax.text import text_job

    is_chat = given.chat or not all(isinstance(prompt, str) for prompt in prompts)
    model, settings = open_model(given, is_chat, prompts)
    job = text_job(
        model, prompts, chat=given.chat, log_probs=given.log_probs, batch_size=given.batch_size,
        **settings,
    )  # fmt: skip
    if given.out is None:
        if warning := job.cost().warning(LESS_MEMORY):
            say(warning)
        for number, answer in sorted(with_progress(job.answers(), len(prompts), 0).items()):
            print(answer.text if len(prompts) == 1 else f"[{number}] {answer.text}", flush=True)
        return
    kept = f"the answers so far are in {given.out}; the same command continues with the rest"
    with open_answers(given.out, job, prompts) as answers, keeping(lambda: kept):
        done = len(prompts) - len(answers.remaining)
        say(work_ahead(job, answers.remaining))
        print_cost("generation", job.cost(answers.remaining), LESS_MEMORY, say)

        def written() -> Iterator[tuple[int, Any]]:
            for number, answer in job.answers(answers.remaining):
                answers.add(number, answer)
                yield number, answer

        with_progress(written(), len(prompts), done)
    print(f"{len(prompts)} answers are in {given.out}", flush=True)


def generate_options() -> Options:
    parser = Options("generate", __doc__)
    add_model_options(parser)
    group = parser.add_argument_group("prompts and answers")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given again"
    )
    group.add_argument("--file", metavar="JSONL", help="prompts, one JSON object per line")
    group.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    group.add_argument("--out", metavar="JSONL", help="where answers go; default: the terminal")
    group.add_argument("--log-probs", action="store_true", help="keep each token's, with --out")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at a time")
    group.add_argument(
        "--compile-for", metavar="POD", help="run nothing: say what it takes of v5e:2x2, ..."
    )
    add_sampling_options(parser)
    return parser


def fit_generation(given: argparse.Namespace) -> None:
    """Compiles a batch of answers for a pod that need not be here; no prompts: to short ones."""
    prompts = read_prompts(given) if given.prompt or given.file else []
    from dials_jax.cli.fit import fit_or_exit
    from dials_jax.cli.open_model import answering_of
    from dials_jax.pods.programs import answering_knobs, answering_programs

    answering = answering_of(given, prompts)
    fit_or_exit(answering, given.compile_for, answering_programs, answering_knobs)


def check_generate(given: argparse.Namespace) -> None:
    """Raises: InputError for options without sense, before a model is loaded."""
    require(given.batch_size > 0, f"--batch-size={given.batch_size} must be positive")
    require(all(given.stop), "--stop has an empty text; leave it out")
    require(
        given.out is not None or not given.log_probs,
        "--log-probs are kept in the file of --out; give one, as --out answers.jsonl",
    )
    if given.out is not None:
        file_to_write(given.out, "--out", "answers.jsonl")


def read_prompts(given: argparse.Namespace) -> list[Any]:
    """The prompts of the options, then those of the file.

    Raises: InputError for a line without a prompt, naming it.
    """
    prompts = list(given.prompt)
    if given.file is not None:
        from dials_jax.data.records import read_jsonl
        from dials_jax.files import local_path

        for line, record in read_jsonl(local_path(given.file, "--file")):
            found = [record[name] for name in ("prompt", "messages") if name in record]
            require(
                len(found) == 1 and isinstance(found[0], str | list),
                f'{given.file}:{line}: give either {{"prompt": "..."}} or {{"messages": [...]}}',
            )
            prompts += found
    require(bool(prompts), 'there are no prompts; give --prompt "..." or --file prompts.jsonl')
    return prompts


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work_ahead(job: Any, remaining: list[int]) -> str:
    """How much there is to do, in a line."""
    from dials_jax.caching.plain import NoCache

    lengths = [len(job.prompts[i]) for i in remaining] or [0]
    steps = job.sampler.count_steps(job.cache or NoCache())
    return (
        f"{len(remaining)} of {len(job.prompts)} prompts to answer, of {min(lengths)} to "
        f"{max(lengths)} tokens: up to {job.length} new ones each, in at most {steps} passes, "
        f"{job.batch_size} prompts at a time"
    )


def with_progress(answers: Iterator[tuple[int, Any]], total: int, done: int) -> dict[int, Any]:
    """Takes all answers, showing tokens per second, passes and layers run.

    Args:
      done: answers of an earlier run.
    """
    from dials_jax.progress import Pace, progress_bar

    found: dict[int, Any] = {}
    pace = Pace(total - done, "generation", say)
    start = time.perf_counter()
    with progress_bar(total, done, "answers", "answer") as bar:
        for number, answer in answers:
            found[number] = answer
            pace.measured(1, answer.seconds)
            bar.set_postfix_str(speed(found, time.perf_counter() - start), refresh=False)
            bar.update()
    if found:
        print(f"{len(found)} answers: {speed(found, time.perf_counter() - start)}", file=sys.stderr)
    return found


def speed(found: dict[int, Any], seconds: float) -> str:
    """Tokens per second with and without compilation, passes per answer, and layers run."""
    num_tokens = sum(len(answer.tokens) for answer in found.values())
    passes = sum(answer.passes for answer in found.values())
    layers = sum(answer.layers_run * answer.passes for answer in found.values()) / passes
    running = sum(answer.seconds for answer in found.values())
    return (
        f"{num_tokens / max(running, 1e-9):.3g} tokens/s ({num_tokens / seconds:.3g} with "
        f"compilation), {passes / len(found):.3g} passes each, {layers:.1%} of the layers"
    )
