"""Rules for routers on real text, at equal cost: `python -m benchmarks.routers --help`.

    python -m benchmarks.routers --text data/text --tokenizer data/gpt2_bpe \\
        --workdir runs/routers --out routers.json
    python -m benchmarks.routers_page routers.json docs/results/routers.md

A LLaDA is trained from scratch, and routers on it for every lambda and seed, by the paper's noise
and by noise that falls to 0. Each is run by several rules:

- `paper`: the share of hard votes meets tau = 0.1.
- `soft`: the mean probability of a vote meets tau = 0.1.
- `annealed`: the paper's rule, on routers trained with falling noise.

And with thresholds fitted on calibration texts so that a share of the layers runs (`--ratios`), one
for all layers or one per layer. Then rules are compared at equal cost, on the same texts. Documents
of the validation file are test texts and calibration texts in turn. What is done is kept in the
workdir: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import make_main
from benchmarks.report import describe_machine
from dials_jax.config import ObjectiveConfig, OptimizerConfig, RouterConfig, TextData, TrainConfig
from dials_jax.data.records import read_jsonl
from dials_jax.data.sources import load_training_data
from dials_jax.errors import require
from dials_jax.evaluation.batched import likelihood_batches
from dials_jax.files import read_json, replacing, write_json
from dials_jax.loading import load
from dials_jax.models.families import llada_small
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.reporting.training_plots import training_curves
from dials_jax.skipping.flops import Flops
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.similarity import choose_static_layers, layer_similarities
from dials_jax.skipping.storage import load_router
from dials_jax.training.loop import train
from dials_jax.training.thresholds import Calibration, calibration_batch
from dials_jax.workdir import exclusive

GPT2_END, MASK, VOCABULARY = 50256, 50257, 50304
TRAINED = ("paper", "annealed")  # how the noise of training goes
# Rules with a fitted threshold: how the routers were trained, their votes, one tau per layer.
FITTED = {
    "hard, one tau": ("paper", "hard", False),
    "hard, tau per layer": ("paper", "hard", True),
    "soft, one tau": ("paper", "soft", False),
    "soft, tau per layer": ("paper", "soft", True),
    "annealed, one tau": ("annealed", "hard", False),
    "annealed, tau per layer": ("annealed", "hard", True),
}
# Settings that say where things are, and not what is measured.
PLACES = ("text", "tokenizer", "workdir", "out")


@dataclass(frozen=True)
class Case:
    """A policy, and how the results call it."""

    rule: str
    policy: Policy | None
    facts: dict[str, Any]  # lambda, seed, ratio, thresholds, where they apply

    @property
    def name(self) -> str:
        return row_name({"rule": self.rule, **self.facts})


def row_name(row: dict[str, Any]) -> str:
    known = [f"{key}={row[key]:g}" for key in ("lambda", "seed", "ratio", "k") if key in row]
    return " ".join([row["rule"], *known])


# ------------------------------------------------------------------------------------ training


def split_documents(path: Path, folder: Path) -> dict[str, Path]:
    """Writes the documents of a file to two, in turns; returns the two by name."""
    files = {name: folder / f"{name}.jsonl" for name in ("test", "calibration")}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        documents = [json.dumps(record) + "\n" for _, record in read_jsonl(path)]
        for number, file in enumerate(files.values()):
            with replacing(file) as opened:
                opened.write("".join(documents[number::2]).encode())
    return files


def text_data(options: argparse.Namespace, path: Path) -> TextData:
    return TextData(
        paths=(str(path),),
        tokenizer=str(options.tokenizer),
        length=options.length,
        prompt_length=options.length // 4,
        random_length_prob=0.0,
        cache=str(Path(options.workdir) / "packed"),
    )


def model_config(options: argparse.Namespace) -> TrainConfig:
    """LLaDA's training; the whole sequence may be masked."""
    shape = {"num_layers": options.layers, "d_model": options.width, "max_length": options.length}
    ids = {"mask_id": MASK, "eos_id": GPT2_END, "pad_id": GPT2_END, "vocab_size": VOCABULARY}
    return TrainConfig(
        model=llada_small(**shape, **ids),
        data=replace(text_data(options, Path(options.text) / "train.jsonl.xz"), prompt_length=0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            weight_decay=0.1,
            final_scale=0.1,
            num_steps=options.model_steps,
            warmup_steps=max(1, options.model_steps // 15),
        ),
        batch_size=4 * options.batch,
        log_every=20,
        save_every=500,
    )


def router_config(
    options: argparse.Namespace, trained: str, skip_weight: float, seed: int, held_out: Path
) -> TrainConfig:
    """The paper's settings, with a learning rate for a short run."""
    steps = options.router_steps
    return TrainConfig(
        backbone=str(Path(options.workdir) / "model" / "model"),
        router=RouterConfig(
            d_hidden=128, anneal_steps=max(1, 4 * steps // 5) if trained == "annealed" else None
        ),
        data=text_data(options, Path(options.text) / "train.jsonl.xz"),
        validation=text_data(options, held_out),
        validate_every=max(1, steps // 5),
        validation_batches=4,
        objective=ObjectiveConfig(skip_weight=skip_weight),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, num_steps=steps, warmup_steps=max(1, steps // 5)
        ),
        batch_size=options.batch,
        seed=seed,
        log_every=10,
        save_every=steps,
        keep_checkpoints=1,
    )


def router_folder(options: argparse.Namespace, trained: str, weight: float, seed: int) -> Path:
    return Path(options.workdir) / f"router-{trained}-{weight:g}-{seed}"


def train_all(options: argparse.Namespace, held_out: Path) -> None:
    """Trains the model and all routers that are not there yet."""
    workdir = Path(options.workdir)
    if not (workdir / "model" / "model" / "config.json").exists():
        train(model_config(options), workdir / "model")
    for weight, seed, trained in itertools.product(options.lambdas, options.seeds, TRAINED):
        folder = router_folder(options, trained, weight, seed)
        if not (folder / "router" / "config.json").exists():
            print(f"{folder.name}:", flush=True)
            train(router_config(options, trained, weight, seed, held_out), folder)


# ------------------------------------------------------------------------------------- scoring


def make_cases(
    options: argparse.Namespace, model: Model, prompts: list[list[int]]
) -> Iterator[Case]:
    """The policies, one at a time: fitting takes time, and a run that goes on needs few of them."""
    yield Case("full", None, {})
    answer_length = options.length - options.length // 4
    similarities = layer_similarities(model, prompts, answer_length, 32)
    for k in options.skipped:
        layers = choose_static_layers(similarities, k, None)
        yield Case("static", Static(layers), {"k": k, "layers": list(layers)})
        yield Case("random", Random(k), {"k": k})
    for weight, seed in itertools.product(options.lambdas, options.seeds):
        policies = {
            trained: load_router(router_folder(options, trained, weight, seed), model)
            for trained in TRAINED
        }
        where = {"lambda": weight, "seed": seed}
        yield Case("paper", policies["paper"], where)
        yield Case("soft", replace(policies["paper"], votes="soft"), where)
        yield Case("annealed", policies["annealed"], where)
        for ratio, (rule, (trained, votes, per_layer)) in itertools.product(
            options.ratios, FITTED.items()
        ):
            policy = replace(policies[trained], votes=votes)
            yield Case(rule, policy, {**where, "ratio": ratio, "per_layer": per_layer})


def fitted_case(case: Case, fit: Calibration) -> Case:
    """The same with thresholds, where it names a share of the layers."""
    if "ratio" not in case.facts:
        return case
    found = fit.fit(case.policy, case.facts["ratio"], case.facts["per_layer"])
    facts = {**case.facts, "thresholds": found.thresholds, "reached": found.reached}
    return Case(case.rule, replace(case.policy, threshold=found.threshold), facts)


def score(
    model: Model, pairs: list[tuple[list[int], list[int]]], policy: Policy | None, num_samples: int
) -> dict[str, Any]:
    """Nats per token of each answer, the layers that ran for it, and the cost of all."""
    nats = np.zeros(len(pairs))
    layers, copies, costs = np.zeros(len(pairs)), np.zeros(len(pairs)), []
    for batch in likelihood_batches(
        model, pairs, num_samples=num_samples, policy=policy, batch_size=256
    ):
        np.add.at(nats, batch.requests, -batch.scores.log_likelihood)
        np.add.at(layers, batch.requests, np.mean(batch.scores.gates, axis=0))
        np.add.at(copies, batch.requests, 1)
        costs.append(batch.flops)
    lengths = np.array([len(answer) for _, answer in pairs])
    cost = Flops.sum(costs)
    return {
        "nelbo": float(np.mean(nats / copies / lengths)),
        "layers_run": cost.layers_run,
        "flops_share": cost.flops_share,
        "seconds": cost.seconds,
        "items": np.round(nats / copies / lengths, 6).tolist(),
        "item_layers": np.round(layers / copies, 6).tolist(),
    }


class Results:
    """The rows measured so far, in the workdir and where the user wants them."""

    def __init__(self, options: argparse.Namespace):
        self._files = [Path(options.workdir) / "routers.json", Path(options.out)]
        settings = {key: x for key, x in vars(options).items() if key not in PLACES}
        self._results = {
            "machine": describe_machine(),
            "settings": settings,
            "rows": [],
            "training": {},
        }
        if self._files[0].exists():
            found = read_json(self._files[0])
            require(
                found["settings"] == json.loads(json.dumps(settings)),
                f"{self._files[0]} was measured with other settings; choose another --workdir",
            )
            self._results = found
        self.names = {row_name(row) for row in self._results["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        self._results["rows"].append(row)
        self.names.add(row_name(row))
        if len(self.names) % 10 == 0:
            self.write()

    def note_training(self, name: str, folder: Path) -> None:
        """Keeps what a training logged of held-out texts."""
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        self._results["training"][name] = [r for r in records if "validation/loss" in r]

    def write(self) -> None:
        for file in self._files:
            write_json(file, self._results)


def run(options: argparse.Namespace) -> None:
    for name in ("train.jsonl.xz", "validation.jsonl.xz"):
        file = Path(options.text) / name
        require(file.is_file(), f"{file} is missing; --text is a folder with {name}")
    require(not Path(options.out).is_dir(), f"--out {options.out} is a folder; name a file in it")
    start = time.perf_counter()
    with exclusive(Path(options.workdir)):
        results = Results(options)
        files = split_documents(Path(options.text) / "validation.jsonl.xz", Path(options.workdir))
        train_all(options, files["calibration"])
        for weight, seed, trained in itertools.product(options.lambdas, options.seeds, TRAINED):
            folder = router_folder(options, trained, weight, seed)
            results.note_training(folder.name, folder)
        results.write()
        draw_training(options)
        print(f"trained after {time.perf_counter() - start:.0f} s", flush=True)
        score_all(options, files, results)
        results.write()
    print(f"all rows in {options.out} after {time.perf_counter() - start:.0f} s")


def score_all(options: argparse.Namespace, files: dict[str, Path], results: Results) -> None:
    model = load(str(Path(options.workdir) / "model" / "model"), layout="stacked")
    rows = {
        name: load_training_data(text_data(options, file), model.config, model.path)[0]
        for name, file in files.items()
    }
    tokens, answer, _ = rows["test"].rows(np.arange(min(options.items, rows["test"].num_rows)))
    prompt = int((~answer[0]).sum())
    pairs = [(row[:prompt].tolist(), row[prompt:].tolist()) for row in tokens]
    batch = calibration_batch(rows["calibration"], options.calibration, model.mesh)
    fit = Calibration(model, ObjectiveConfig(), batch)
    calibrating = rows["calibration"].rows(np.arange(min(32, rows["calibration"].num_rows)))[0]
    prompts = [row[:prompt].tolist() for row in calibrating]
    for case in make_cases(options, model, prompts):
        if case.name not in results.names:
            case = fitted_case(case, fit)
            row = {"rule": case.rule, **case.facts}
            row |= score(model, pairs, case.policy, options.samples)
            found = f"{row['nelbo']:.4f} nats per token, {row['layers_run']:.1%} of layers"
            print(f"{case.name}: {found}", flush=True)
            results.add(row)


def draw_training(options: argparse.Namespace) -> None:
    """Curves of the routers of the middle lambda and the first seed, beside the results."""
    weight = sorted(options.lambdas)[len(options.lambdas) // 2]
    folders = [router_folder(options, trained, weight, options.seeds[0]) for trained in TRAINED]
    path = Path(options.out).with_name("routers_training.png")
    training_curves([folder / "metrics.jsonl" for folder in folders], path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", required=True, help="folder of train.jsonl.xz and validation.jsonl.xz"
    )
    parser.add_argument("--tokenizer", required=True, help="folder of GPT-2's vocabulary")
    parser.add_argument("--workdir", required=True, help="models and results; goes on from there")
    parser.add_argument("--out", required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="a quarter is the prompt")
    parser.add_argument("--batch", type=int, default=64, help="of routers; the model's is 4 times")
    parser.add_argument("--model-steps", type=int, default=1200)
    parser.add_argument("--router-steps", type=int, default=250)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.5, 1.5, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9167, 0.8333])
    parser.add_argument("--skipped", type=int, nargs="+", default=[1, 2], help="layers")
    parser.add_argument("--items", type=int, default=512, help="test texts")
    parser.add_argument("--calibration", type=int, default=256, help="texts for thresholds")
    parser.add_argument("--samples", type=int, default=8, help="masked copies of a test text")


main = make_main("routers", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
