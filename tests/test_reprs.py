"""What a notebook shows of an object: short, and never an array."""

import re

import jax
import numpy as np

import dials_jax as dj
from dials_jax.bench import Bench
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.models.model import Model
from dials_jax.skipping.routed import Routed
from dials_jax.text import text_job
from dials_jax.training.step import TrainState
from tests.conftest import init_params, small_config


def test_a_model():
    cfg = small_config()
    shown = repr(Model(cfg, init_params(cfg), path="runs/x"))
    assert re.fullmatch(
        r"Model\(llada, 4 layers of width 32, 0\.0\d+ M parameters, float32, 'runs/x'\)", shown
    )


def test_a_router_shows_no_arrays_even_while_it_is_traced(routers):
    shown = []
    jax.eval_shape(lambda router: shown.append(repr(Routed(router, 0.25))), routers)
    assert shown == [repr(Routed(routers, 0.25))]
    assert re.fullmatch(r"Routed\([\d,]+ parameters, threshold 0\.25, hard votes\)", shown[0])
    assert "of shape (4,)" in repr(Routed(routers, (0.1, 0.2, 0.3, 0.4)))
    assert repr(Routed(None)) == "Routed(no router, threshold 0.1, hard votes)"


def test_a_tokenizer():
    assert repr(character_tokenizer("abc")) == "Tokenizer(6 ids, special: [PAD], [EOS], [MASK])"


def test_a_generation_is_a_small_table(lively, routers):
    prompts = np.random.default_rng(0).integers(2, 60, (9, 5))
    sampler = dj.Confidence(4, cfg_scale=1.0)
    out = dj.generate(lively, prompts, sampler=sampler, policy=Routed(routers, 0.3))
    first, header, *rows, more = repr(out).splitlines()
    assert first.startswith("Generation(9 x 9 tokens, 4 calls, layers run ")
    assert header.split() == ["sequence", "tokens", "passes", "tokens/pass", "layers", "run"]
    assert len(rows) == 8 and more == "... and 1 more"
    ran = out.gates[:, :, [1, 10]].mean()  # of its halves under guidance
    assert rows[1].split() == ["1", str(out.num_tokens[1]), "4", f"{out.num_tokens[1] / 4:.2f}",
                               f"{ran:.1%}"]  # fmt: skip


def test_a_state_of_training_has_a_number_of_steps_or_only_shapes():
    params = {"w": np.zeros((3, 4), np.float32)}
    state = TrainState(np.int32(7), params, (), np.int32(-1))
    assert repr(state) == "TrainState(step 7, 12 parameters)"
    shapes = jax.eval_shape(lambda state: state, state)
    assert repr(shapes) == "TrainState(traced, 12 parameters)"


def test_what_a_forward_pass_returns(lively):
    assert repr(lively.apply(np.ones((2, 5), int))) == (
        "Output(logits (2, 5, 64) float32, gates (4, 2))"
    )


def test_work_ahead_shows_counts(arithmetic_model):
    model = dj.load(arithmetic_model / "model")
    job = text_job(model, ["+12,34=", "s7,5="], max_new_tokens=4)
    assert repr(job).startswith("TextJob(2 prompts, 4 new tokens each, Confidence(")
    assert repr(Bench(model, [[2, 3]], dj.Confidence(4), [])) == (
        f"Bench({model!r}, 1 prompts, 0 cases)"
    )
