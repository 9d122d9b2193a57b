"""Times evaluation end to end, padding and host included: `python -m benchmarks.evaluate --help`.

Weights are random, of the true shape. Prompts have mixed lengths, uniform between --shortest and
--prompt. Two measurements:

- generation: `generate_all` in batches that wait for their slowest sequence, and with sequences
  that make room for others once they have ended (`dials_jax.sampling.refill`), in turns. A random
  model never ends a text, so the sampler stands in: a token that is revealed is end of text with
  probability 1/--end-after. Answers so end at mixed places, about as long as that or --gen.
- likelihood: `log_likelihoods` with --samples masked copies per pair, against the bare forward pass
  of a full batch without padding. Rates count the FLOPs of real tokens only: what padding computes
  is time lost.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import add_layers, add_layout, add_model, add_out, make_main
from benchmarks.random_model import make_config, make_model
from benchmarks.report import LiveTable, peak_gigabytes, run_and_count_compilation
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.evaluation.batched import (
    STRATUM,
    generate_all,
    generation_batches,
    log_likelihoods,
)
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.flops import head_flops, layer_flops

COLUMNS = {
    "case": "<12", "requests": ">8d", "seconds": ">9.2f", "tokens_per_s": ">12.1f",
    "tflop_per_s": ">11.1f", "against": ">8.3f", "equal": ">6.3f", "compile_s": ">9.1f",
    "peak_gb": ">7.1f",
}  # fmt: skip


@dataclass(frozen=True)
class RandomEnds(Confidence):
    """Confidence whose revealed tokens are end of text with a small probability."""

    end_after: int = 128

    def propose(self, cfg: ModelConfig, logits, keys):
        guess, confidence = super().propose(cfg, logits, keys)
        draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2))))
        return jnp.where(draw(keys) < 1 / self.end_after, cfg.eos_id, guess), confidence


def random_prompts(cfg: ModelConfig, count: int, shortest: int, longest: int) -> list[np.ndarray]:
    """Prompts of mixed lengths without special tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(10, min(cfg.vocab_size, 400), n).astype(np.int32) for n in lengths]


# ------------------------------------------------------------------------------------ generation


def time_generation(model: Model, options: argparse.Namespace, table: LiveTable) -> None:
    """Both ways in turns; the tokens that count are those before the end of text."""
    cfg = model.config
    prompts = random_prompts(cfg, options.prompts, options.shortest, options.prompt)
    sampler = RandomEnds(
        options.gen, options.block, options.steps, stop_at_eos=True, end_after=options.end_after
    )
    settings = {
        "sampler": sampler, "cache": parse_cache(options.cache), "batch_size": options.batch,
        "max_programs": options.programs,
    }  # fmt: skip
    generate = {
        "waiting": partial(generate_all, model, prompts, refill=False, **settings),
        "refilled": partial(generate_all, model, prompts, refill=True, **settings),
    }
    compiled, seconds, answers = {}, {name: [] for name in generate}, {}
    for name, refill in (("waiting", False), ("refilled", True)):
        compiled[name] = _compile_generation(model, prompts, refill, settings)
    for _ in range(options.repeats):
        for name, run in generate.items():
            start = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - start)
    waiting = float(np.median(seconds["waiting"]))
    for name, found in answers.items():
        median, count = float(np.median(seconds[name])), _num_tokens(found, cfg)
        table.add_row(
            case=name, requests=len(prompts), seconds=median, tokens_per_s=count / median,
            against=waiting / median, equal=_share_equal(found, answers["waiting"], cfg),
            compile_s=compiled[name], peak_gb=peak_gigabytes(), all_seconds=seconds[name],
        )  # fmt: skip


def _compile_generation(
    model: Model, prompts: list[np.ndarray], refill: bool, settings: dict[str, Any]
) -> float:
    """Compiles every padded length, by one batch of each; the seconds that it took."""
    from dials_jax.data.buckets import padded_lengths

    lengths = padded_lengths(
        [len(p) for p in prompts], 64, settings["max_programs"], settings["batch_size"]
    )
    few = [lengths.index(size) for size in sorted(set(lengths))]

    def run():
        for _ in generation_batches(model, prompts, refill=refill, remaining=few, **settings):
            pass

    return run_and_count_compilation(run)[1]


def _num_tokens(answers: np.ndarray, cfg: ModelConfig) -> int:
    """Tokens up to each answer's end of text, which counts."""
    ended = np.cumsum(answers == cfg.eos_id, axis=1)
    return int((ended - (answers == cfg.eos_id) == 0).sum())


def _share_equal(answers: np.ndarray, others: np.ndarray, cfg: ModelConfig) -> float:
    """The share of answers that are equal: in bfloat16 close choices may differ."""
    return float((answers == others).all(axis=1).mean())


# ------------------------------------------------------------------------------------ likelihood


@timed_jit("cfg", "answer_length")
def bare_program(params, tokens, *, cfg, answer_length):
    """All layers, and the head at the answer's positions, whose logits are summed."""
    out = transformer.run_layers(cfg, params, tokens, None)
    h = transformer.shift_to_predicted(cfg, out.h)[:, -answer_length:]
    return jnp.sum(transformer.head_logits(cfg, params, h))


def real_flops(cfg: ModelConfig, prompt_length: int, answer_length: int) -> float:
    """FLOPs of one forward pass on a sequence without padding, with logits of the answer."""
    total = prompt_length + answer_length
    return cfg.num_layers * layer_flops(cfg, total) + head_flops(cfg, answer_length)


def time_likelihood(model: Model, options: argparse.Namespace, table: LiveTable) -> None:
    cfg, rng = model.config, np.random.default_rng(1)
    prompts = random_prompts(cfg, options.pairs, options.shortest, options.prompt)
    lengths = rng.integers(8, options.answer + 1, options.pairs)
    answers = [rng.integers(10, 400, n).tolist() for n in lengths]
    pairs = list(zip(map(np.ndarray.tolist, prompts), answers, strict=True))
    batch, answer = options.likelihood_batch, options.answer
    tokens = jnp.asarray(rng.integers(10, 400, (batch, options.prompt + answer)), jnp.int32)
    placed = model.place_sequences(tokens)

    def bare() -> float:
        return model.run(bare_program, placed, answer_length=answer)[1]

    _, compiled = run_and_count_compilation(bare)
    seconds = float(np.median([bare() for _ in range(5)]))
    rate = batch * real_flops(cfg, options.prompt, answer) / seconds
    table.add_row(
        case="bare pass", requests=batch, seconds=seconds, tflop_per_s=rate / 1e12, against=1.0,
        compile_s=compiled, peak_gb=peak_gigabytes(),
    )  # fmt: skip
    settings = {
        "num_samples": options.samples, "batch_size": batch, "max_programs": options.programs
    }  # fmt: skip
    few = min(STRATUM, options.samples)  # one round: its programs are those of all
    _, compiled = run_and_count_compilation(
        lambda: log_likelihoods(model, pairs, **settings | {"num_samples": few})
    )
    start = time.perf_counter()
    log_likelihoods(model, pairs, **settings)
    seconds = time.perf_counter() - start
    flops = options.samples * sum(real_flops(cfg, len(p), len(a)) for p, a in pairs)
    table.add_row(
        case="likelihood", requests=len(pairs) * options.samples, seconds=seconds,
        tflop_per_s=flops / seconds / 1e12, against=flops / seconds / rate, compile_s=compiled,
        peak_gb=peak_gigabytes(),
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layers(parser)
    add_layout(parser)
    parser.add_argument("--prompts", type=int, default=256, help="to generate for; 0: none")
    parser.add_argument("--shortest", type=int, default=32, help="tokens of the shortest prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--gen", type=int, default=256, help="tokens to generate at most")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--steps", type=int, default=128, help="denoising steps of --gen tokens")
    parser.add_argument("--end-after", type=int, default=128, help="tokens, on average")
    parser.add_argument("--cache", default="dual", help="none or dual")
    parser.add_argument("--batch", type=int, default=32, help="sequences generated at a time")
    parser.add_argument("--pairs", type=int, default=64, help="to score; 0: none")
    parser.add_argument("--answer", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--samples", type=int, default=128, help="masked copies per pair")
    parser.add_argument("--likelihood-batch", type=int, default=32, help="copies at a time")
    parser.add_argument("--programs", type=int, default=4, help="padded lengths or shapes")
    parser.add_argument("--repeats", type=int, default=2, help="of both ways to generate")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    require(
        0 < options.shortest <= options.prompt,
        f"--shortest {options.shortest} must lie between 1 and --prompt {options.prompt}",
    )
    cfg = make_config(options.model, options.layers)
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = make_model(cfg, options.layout, weights=options.weights)
    if options.prompts:
        time_generation(model, options, table)
    if options.pairs:
        time_likelihood(model, options, table)


main = make_main("evaluate", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
