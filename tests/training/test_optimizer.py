"""The learning rate by step, and what an optimiser step does with a gradient."""

import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.config import ObjectiveConfig, OptimizerConfig
from dials_jax.errors import InputError
from dials_jax.training.optimizer import make_lr_schedule, make_optimizer, num_steps, warmup_steps

EPOCH = 10  # steps


def test_the_schedule_warms_up_and_follows_half_a_cosine():
    cfg = OptimizerConfig(learning_rate=0.4, num_steps=30, warmup_steps=10, final_scale=0.1)
    schedule = make_lr_schedule(cfg, EPOCH)
    assert schedule(0) == 0
    assert schedule(5) == pytest.approx(0.2)
    assert schedule(10) == pytest.approx(0.4)
    assert schedule(20) == pytest.approx((0.4 + 0.04) / 2)
    assert schedule(30) == pytest.approx(0.04)


def test_without_a_final_scale_the_middle_of_the_cosine_is_half_the_peak():
    cfg = OptimizerConfig(learning_rate=0.4, num_steps=30, warmup_steps=10)
    schedule = make_lr_schedule(cfg, EPOCH)
    assert schedule(20) == pytest.approx(0.2)
    assert schedule(30) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    cfg = OptimizerConfig(learning_rate=0.4, num_steps=30, warmup_steps=0, lr_schedule=schedule)
    assert make_lr_schedule(cfg, EPOCH)(0) == pytest.approx(0.4)


def test_a_constant_rate_stays_after_the_warm_up():
    cfg = OptimizerConfig(
        learning_rate=0.4, num_steps=30, warmup_steps=10, lr_schedule="constant", final_scale=0.1
    )
    schedule = make_lr_schedule(cfg, EPOCH)
    rates = [float(schedule(step)) for step in (0, 5, 10, 20, 29)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.4, 0.4])


def test_epochs_become_steps():
    cfg = OptimizerConfig(num_epochs=2.5, warmup_epochs=0.5)
    assert (num_steps(cfg, EPOCH), warmup_steps(cfg, EPOCH)) == (25, 5)
    schedule = make_lr_schedule(cfg, EPOCH)
    assert schedule(5) == pytest.approx(cfg.learning_rate)
    assert schedule(25) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [-3, 30, 31])
def test_a_warm_up_that_does_not_end_or_is_negative_is_refused(warmup):
    cfg = OptimizerConfig(num_steps=30, warmup_steps=warmup)
    with pytest.raises(InputError, match=f"warm-up of {warmup} steps"):
        make_lr_schedule(cfg, EPOCH)


def test_training_without_steps_is_refused():
    cfg = OptimizerConfig(num_steps=0, warmup_steps=0)
    with pytest.raises(InputError, match="no steps"):
        make_lr_schedule(cfg, EPOCH)


def test_a_moving_average_that_never_moves_is_refused():
    with pytest.raises(InputError, match=r"ema=1\.0 must lie between"):
        OptimizerConfig(num_steps=30, warmup_steps=0, ema=1.0)


def test_a_skip_rate_in_percent_is_refused():
    with pytest.raises(InputError, match=r"target_skip_rate=50.0 must lie in \[0, 1\]"):
        ObjectiveConfig(target_skip_rate=50.0)


CFG = OptimizerConfig(
    learning_rate=0.1, b1=0.8, b2=0.6, eps=0.01, weight_decay=0.3, num_steps=10, warmup_steps=0
)


def steps(cfg, gradients, start):
    """The parameter after each of the gradients."""
    optimizer = make_optimizer(cfg, EPOCH)
    params = jnp.asarray(start)
    state, seen = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = params + update
        seen.append(np.asarray(params))
    return seen


def test_two_adamw_steps_worked_out_by_hand():
    schedule = make_lr_schedule(CFG, EPOCH)
    w, m, v, expected = 2.0, 0.0, 0.0, []
    for t, g in enumerate((0.5, -0.2), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.6 * v + 0.4 * g**2
        adam = m / (1 - 0.8**t) / ((v / (1 - 0.6**t)) ** 0.5 + 0.01)
        w -= float(schedule(t - 1)) * (adam + 0.3 * w)
        expected.append(w)
    assert steps(CFG, (0.5, -0.2), 2.0) == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped_to_norm_one_over_all_parameters():
    """(3, 4) has norm 5, so it acts like (0.6, 0.8); a shorter one is left alone."""
    [clipped], [same] = (steps(CFG, [g], [0.0, 0.0]) for g in ([3.0, 4.0], [0.6, 0.8]))
    assert clipped == pytest.approx(same, rel=1e-6)
    [short], [shorter] = (steps(CFG, [g], [0.0, 0.0]) for g in ([0.06, 0.08], [0.006, 0.008]))
    assert abs(short[0] - shorter[0]) > 0.01
