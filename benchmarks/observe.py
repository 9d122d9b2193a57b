"""Times the study of representations beside generation: `python -m benchmarks.observe --help`.

Weights are random, of the true shape, and made on the device; the prompts are random tokens, of one
length. Two measurements, in turns:

- generation: `generate` over all prompts, batch by batch.
- study: the same with an observer, and each batch's profile brought to the host, merged and stored,
  as `RepresentationStudy` does.

Seconds are those of the whole loop, host included, without compilation. Memory is what the
program takes on the device, with the weights: the peak of the process may be older, from the time
when the weights were made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.command import add_layers, add_layout, add_model, add_out, make_main
from benchmarks.random_model import make_config, make_model
from benchmarks.report import LiveTable, peak_gigabytes, run_and_count_compilation
from dials_jax.compiling import forget_programs, largest_program
from dials_jax.errors import require
from dials_jax.evaluation.batched import request_keys
from dials_jax.models.model import Model
from dials_jax.sampling.generate import generate
from dials_jax.studies.profile import save_profile
from dials_jax.studies.settings import RepresentationStudy
from dials_jax.studies.trajectories import Trajectories, prompt_keys

COLUMNS = {
    "case": "<12", "prompts": ">8d", "seconds": ">9.2f", "ms_a_call": ">10.2f", "against": ">8.3f",
    "compile_s": ">9.1f", "program_gb": ">11.2f",
    "peak_gb": ">8.2f",
}  # fmt: skip


def study_of(options: argparse.Namespace) -> RepresentationStudy:
    """The study whose defaults are measured. It reads no file here."""
    from dials_jax.config import ArithmeticData

    return RepresentationStudy(
        models=(("random", "random"),),
        data=ArithmeticData(),
        num_prompts=options.prompts,
        gen_length=options.gen,
        steps=options.steps,
        batch_size=options.batch,
    )


def make_runs(
    model: Model, options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[int], None]]:
    """What is timed; each takes how many prompts to run."""
    cfg, study = model.config, study_of(options)
    rng = np.random.default_rng(0)
    high = min(1000, cfg.vocab_size // 2)
    prompts = rng.integers(2, high, (options.prompts, options.prompt)).tolist()
    keys = prompt_keys(prompts)
    run = Trajectories(
        model, study.sampler_of(cfg), study.observer_of(cfg), options.prompt, options.batch
    )

    def batches(count: int):
        for first in range(0, count, options.batch):
            part = slice(first, min(first + options.batch, count))
            yield prompts[part], keys[part]

    def generation(count: int) -> None:
        for batch, numbers in batches(count):
            generate(
                model,
                np.array(batch, np.int32),
                sampler=run.sampler,
                key=request_keys(run.seed, numbers),
                fill_to=options.batch,
            )

    def observed(count: int) -> None:
        profile = None
        for batch, numbers in batches(count):
            found = run.measure(batch, numbers)
            profile = found if profile is None else profile.merge(found)
            save_profile(profile, folder)

    return {"generation": generation, "study": observed}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layers(parser)
    add_layout(parser)
    parser.add_argument("--prompts", type=int, default=64, help="to generate for")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--gen", type=int, default=256, help="tokens to generate")
    parser.add_argument("--steps", type=int, default=64, help="denoising steps")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time")
    parser.add_argument("--repeats", type=int, default=2, help="of both, in turns")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    cfg = make_config(options.model, options.layers)
    require(
        not cfg.causal,
        f"--model {options.model} is causal: its study is one more pass over the texts; give a "
        "diffusion model",
    )
    study_of(options)  # refuses wrong settings
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout, weights=options.weights)
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(model, options, Path(folder))
        memory, seconds = {}, {name: [] for name in runs}
        for name, call in runs.items():
            forget_programs()
            compiled = run_and_count_compilation(call, options.batch)[1]
            memory[name] = {
                "compile_s": compiled, "program_gb": largest_program() / 1e9,
                "peak_gb": peak_gigabytes(),
            }  # fmt: skip
        for call in runs.values():  # what was forgotten is compiled again
            call(options.batch)
        for _ in range(options.repeats):
            for name, call in runs.items():
                start = time.perf_counter()
                call(options.prompts)
                seconds[name].append(time.perf_counter() - start)
    calls = options.steps * -(-options.prompts // options.batch)
    base = float(np.median(seconds["generation"]))
    for name, all_seconds in seconds.items():
        median = float(np.median(all_seconds))
        table.add_row(
            case=name, prompts=options.prompts, seconds=median, ms_a_call=1e3 * median / calls,
            against=median / base, all_seconds=all_seconds, **memory[name],
        )  # fmt: skip


main = make_main("observe", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
