"""What runs will take, said before they start: counted from shapes, timed by their first part."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dials_jax as dj
from dials_jax import estimates, progress
from dials_jax.cli.generate import generate_command
from dials_jax.config import EvalTask, TaskData
from dials_jax.estimates import (
    RunEstimate,
    activation_bytes,
    cache_bytes,
    device_bytes,
    forward_flops,
    generation_flops,
    print_cost,
    training_flops,
)
from dials_jax.evaluation.items import make_item
from dials_jax.evaluation.likelihood import ANSWER_CHUNK
from dials_jax.evaluation.sweep_cost import task_cost
from dials_jax.models.model import Model
from dials_jax.progress import Pace
from dials_jax.text import text_job
from tests.conftest import init_params, small_config

PROMPTS = np.random.default_rng(0).integers(2, 60, (2, 5))


@pytest.mark.parametrize(
    ("sampler", "cache", "tolerance"),
    [
        (dj.Confidence(8, 4), None, 1e-9),
        (dj.Confidence(8, 4, cfg_scale=1.0), None, 1e-9),
        (dj.Confidence(8, 4), dj.DualCache(), 1e-9),
        (
            dj.Confidence(8, 4),
            dj.EarlySkip((1.0, 0.5), (0.0, 0.5), prompt_every=4, block_every=2),
            0.05,
        ),
        (dj.Confidence(8, 4), dj.PrefixCache(), 1e-9),
        (dj.Dream(8, 8), None, 1e-9),
    ],
    ids=lambda x: type(x).__name__,
)
def test_flops_of_a_generation_are_those_that_it_takes(sampler, cache, tolerance, lively):
    out = dj.generate(lively, PROMPTS, sampler=sampler, cache=cache)
    expected = 2 * generation_flops(lively.config, sampler, cache, 5)
    assert expected == pytest.approx(out.flops.model_total, rel=tolerance)


def test_a_likelihood_holds_the_logits_of_a_chunk_and_of_both_halves_of_guidance():
    cfg, items = small_config(max_length=2000), [make_item([5], [[7] * 1000])]
    model = Model(cfg, init_params(cfg))
    data = TaskData(paths=("x.jsonl",), prompt_length=8, answer_length=4)

    def memory(**settings):
        task = EvalTask(name="text", metric="nelbo", data=data, num_samples=4, **settings)
        return task_cost(task, items, model, batch_size=3).memory["activations"]

    assert memory() == activation_bytes(cfg, 3, 1001, head=ANSWER_CHUNK)
    assert memory(cfg_scale=0.5) == 2 * memory()


def test_few_prompts_need_the_memory_of_few(arithmetic_model):
    model = dj.load(arithmetic_model / "model")
    one, two = (
        text_job(model, ["s7,5="], max_new_tokens=4, batch_size=size).cost() for size in (1, 32)
    )
    assert one == two


def test_training_costs_three_passes_and_a_frozen_model_one_less():
    cfg = small_config()
    one = forward_flops(cfg, 12)
    assert training_flops(cfg, 12, frozen=False, remat=False) == 3 * one
    assert training_flops(cfg, 12, frozen=True, remat=True) == 3 * one
    assert forward_flops(cfg, 12, head=0) < one < forward_flops(cfg, 13)


def test_bytes_are_those_of_one_device():
    mesh = AbstractMesh((4,), ("fsdp",))
    split = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=NamedSharding(mesh, P("fsdp")))
    whole = jax.ShapeDtypeStruct((8, 6), np.float32)
    assert device_bytes({"a": split, "b": (whole, np.zeros(3, np.int16))}) == 48 + 192 + 6


def test_a_cache_holds_keys_and_values_of_all_layers():
    cfg = small_config()
    expected = 2 * cfg.num_layers * 3 * 20 * cfg.num_kv_heads * cfg.head_dim * 4
    assert cache_bytes(cfg, dj.DualCache(), batch=3, length=20) == expected
    assert cache_bytes(cfg, None, batch=3, length=20) == 0


def test_what_does_not_fit_is_said_in_a_line_of_its_own(monkeypatch, capsys):
    found = RunEstimate(1000, 2e12, {"weights": 3e9, "cache": 0.0, "activations": 1e9})
    monkeypatch.setattr(estimates, "device_memory", lambda: 5e9)
    print_cost("sums", found, "lower batch_size")
    monkeypatch.setattr(estimates, "device_memory", lambda: 2e9)
    print_cost("sums", found, "lower batch_size")
    first, again, warning = capsys.readouterr().out.splitlines()
    assert (
        first
        == again
        == (
            "sums: 1,000 tokens, 2e+12 FLOPs, about 4.0 GB per device (weights 3.0 GB, "
            "activations 1.0 GB)"
        )
    )
    assert warning == (
        "this will not fit: it needs about 4.0 GB per device, which has 2.0 GB; lower batch_size"
    )


def test_the_memory_of_this_machine_is_known():
    assert 1e8 < estimates.device_memory() < 1e14


def test_the_pace_of_the_first_part_is_said_once_if_the_rest_is_long(capsys):
    pace = Pace(100, "training")
    pace.measured(1, 3.0)
    pace.measured(1, 90.0)
    assert capsys.readouterr().out == "training: about 5 minutes at this pace\n"
    Pace(100, "training").measured(50, 3.0)
    assert capsys.readouterr().out == ""


def test_a_training_says_what_its_remaining_steps_take(train_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LONG", 0.0)
    config = train_config()
    dj.train(config, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("training: ") and "FLOPs" in line]
    tokens = int(line.split()[1].replace(",", ""))
    assert tokens > 0 and tokens % (config.optimizer.num_steps * config.batch_size) == 0
    assert "weights and state" in line and "gradients" in line
    assert any(line.startswith("training: about ") for line in lines)
    dj.train(config, tmp_path / "run")  # nothing is left
    assert "FLOPs" not in capsys.readouterr().out


def test_answers_to_write_are_estimated_first(arithmetic_model, tmp_path, monkeypatch, capsys):
    model, out = str(arithmetic_model / "model"), str(tmp_path / "answers.jsonl")
    options = ["--prompt", "+12,34=", "--prompt", "s7,5=", "--max-new-tokens", "4"]
    generate_command([model, *options, "--out", out])
    job = text_job(dj.load(model), ["+12,34=", "s7,5="], max_new_tokens=4)
    assert f"generation: {job.cost()}" in capsys.readouterr().err.splitlines()
    assert job.cost().tokens == 8 and job.cost([1]).tokens == 4
    monkeypatch.setattr(estimates, "device_memory", lambda: 1.0)
    generate_command([model, *options])
    assert "this will not fit: " in capsys.readouterr().err
