"""The losses against a slow reference: one sequence and one layer at a time, by DIALS (5-10)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.config import ObjectiveConfig, RouterConfig
from dials_jax.data.batches import Batch
from dials_jax.errors import InputError
from dials_jax.models import families, transformer
from dials_jax.nn.block import Block, BlockInputs, Embed
from dials_jax.nn.kv import Slots
from dials_jax.nn.mask import Mask
from dials_jax.nn.modules import bind
from dials_jax.nn.rope import positions_of, rope_angles
from dials_jax.training.losses import (
    Draws,
    Mean,
    check_objective,
    merge_metrics,
    model_loss,
    router_loss,
)
from tests.conftest import init_params

ROWS, LENGTH, PROMPT, LAYERS = 4, 10, 4, 2
ROUTER = RouterConfig(d_hidden=8, skip_threshold=0.4, temperature=0.7)
OBJECTIVE = ObjectiveConfig(min_mask_ratio=0.2, skip_weight=0.8, target_skip_rate=0.3)


@pytest.fixture(scope="module")
def cut(cfg, model, routers):
    """The first layers of the small model and their routers: the reference is slow."""

    def first(tree):
        return jax.tree.map(lambda x: x[:LAYERS], tree)

    params = {**model.params, "layers": first(model.params["layers"])}
    return dataclasses.replace(cfg, num_layers=LAYERS), params, first(routers)


@pytest.fixture(scope="module")
def batch():
    """Prompts with padding on the left; answers of different lengths."""
    rng = np.random.default_rng(0)
    valid, answer = np.ones((2, ROWS, LENGTH), bool)
    answer[:, :PROMPT] = False
    for row in range(ROWS):
        valid[row, : row % 3] = False
        answer[row, LENGTH - row % 4 :] = False
    tokens = rng.integers(2, 60, (ROWS, LENGTH)).astype(np.int32)
    batch = Batch(tokens, answer, valid, np.arange(ROWS, dtype=np.int32))
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def draws():
    return Draws.of(jax.random.key(5), jnp.arange(ROWS), ROWS)


def noise_of(objective, ratio_key, stratum):
    """A row's mask probability and what its loss is multiplied with."""
    if objective.kind == "llada":
        p = jax.random.uniform(ratio_key, minval=objective.min_mask_ratio, maxval=1.0)
        return p, 1 / p
    t = (1 - objective.min_mask_ratio) * stratum + objective.min_mask_ratio
    return (1 - objective.min_mask_ratio) * t, 1 / t


def reference(cfg, params, routers, batch, draws, objective):
    """The mean of these is the loss; also each row's skip rate, or None, and its masks."""
    losses, rates, counts = [], [], []
    for row in range(ROWS):
        with jax.ensure_compile_time_eval():  # hangs on no parameter
            mask_key, gate_key = jax.random.split(draws.key[row])
            ratio_key, position_key = jax.random.split(mask_key)
            p, weight = noise_of(objective, ratio_key, draws.stratum[row])
            masked = (jax.random.uniform(position_key, (LENGTH,)) < p) & batch.answer[row]
            count, length = int(masked.sum()), int(batch.answer[row].sum())
        masked = np.asarray(masked)
        tokens = jnp.where(masked, cfg.mask_id, batch.tokens[row])[None]
        valid = jnp.asarray(batch.valid[row])[None]
        angles = rope_angles(positions_of(valid), cfg.head_dim, cfg.rope_theta)
        slots = Slots(jnp.arange(LENGTH)[None])
        h, skips = bind(Embed, params["embed"], cfg)(tokens), []
        for layer in range(cfg.num_layers):
            block = jax.tree.map(lambda x, i=layer: x[i], params["layers"])
            new = bind(Block, block, cfg)(h, BlockInputs(angles, Mask(valid), slots))
            if routers is None:
                h = new
                continue
            router = jax.tree.map(lambda x, i=layer: x[i], routers)
            noise = jax.random.gumbel(jax.random.fold_in(gate_key, layer), (LENGTH, 2))
            skip = skip_gate(router, h[0], noise, masked)
            h = h + (1 - skip) * (new - h)
            skips.append(skip)
        counts.append(count)
        logits = transformer.head_logits(cfg, params, h)[0]
        if objective.kind == "mdlm":
            logits = logits.at[:, cfg.mask_id].set(-jnp.inf)
        log_p = jax.nn.log_softmax(logits)
        # Dream's head predicts one token to the right of its row.
        places = np.flatnonzero(masked)
        ce = -log_p[places - cfg.right_shift, batch.tokens[row, places]].sum()
        loss = ce / length * weight
        if routers is not None:
            rates.append(sum(skips) / cfg.num_layers)
            skip_loss = objective.skip_weight * abs(rates[-1] - objective.target_skip_rate)
            loss = loss + skip_loss / (p if objective.scale_skip_by_mask_ratio else 1)
        losses.append(loss if count else 0.0)
    return losses, rates, counts


def skip_gate(router, h, noise, masked):
    """Votes, their mean over masked tokens, DIALS (5), and a trainable threshold, DIALS (6)."""
    x = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-5) * router["norm"]["scale"]
    logits = jax.nn.silu(x @ router["down"] + router["down_bias"]) @ router["vote"]
    soft = jax.nn.softmax((logits + router["vote_bias"] + noise) / ROUTER.temperature)[:, 0]
    votes = soft + jax.lax.stop_gradient((soft > 0.5) - soft)
    share = sum(votes * masked) / max(int(masked.sum()), 1)
    return share + jax.lax.stop_gradient((share > ROUTER.skip_threshold) - share)


def with_gradient(fn):
    """The value of `fn`, what it returns beside, and the gradient, as one program."""
    return jax.jit(jax.value_and_grad(fn, has_aux=True))


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


@pytest.mark.parametrize("scale", [True, False])
def test_the_router_loss_and_its_gradient_are_the_papers(cut, batch, draws, scale):
    cfg, params, routers = cut
    objective = ObjectiveConfig(
        min_mask_ratio=0.2, skip_weight=0.8, target_skip_rate=0.3, scale_skip_by_mask_ratio=scale
    )

    def slow(routers):
        losses, rates, counts = reference(cfg, params, routers, batch, draws, objective)
        return sum(losses), (rates, counts)

    loss_fn = router_loss(cfg, ROUTER, objective, remat=False)
    (total, metrics), grads = with_gradient(loss_fn)(routers, params, batch, draws)
    (expected, (rates, counts)), slow_grads = with_gradient(slow)(routers)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, total / ROWS, rtol=1e-6)
    assert_trees_close(grads, slow_grads)
    seen = [float(rate) for rate, count in zip(rates, counts, strict=True) if count]
    assert 0 < np.mean(seen) < 1  # some layers ran and some did not
    np.testing.assert_allclose(metrics["skip_rate"].value, np.mean(seen), rtol=1e-5)


def test_routers_never_see_the_mask_logit_of_a_backbone_that_never_says_it(cut, batch, draws):
    """Under no objective: MDLM leaves that logit untrained."""
    cfg, params, routers = cut
    loud = params["head"]["kernel"].at[:, cfg.mask_id].multiply(50.0)
    for subs in (True, False):
        loss_fn = router_loss(dataclasses.replace(cfg, subs=subs), ROUTER, OBJECTIVE, remat=False)
        loss_fn = jax.jit(loss_fn)
        one, other = (
            loss_fn(routers, {**params, "head": {"kernel": kernel}}, batch, draws)[0]
            for kernel in (params["head"]["kernel"], loud)
        )
        assert (one == other) == subs


@pytest.mark.parametrize("kind, shift", [("llada", False), ("llada", True), ("mdlm", False)])
def test_the_model_loss_and_its_gradient_are_the_papers(cut, batch, draws, kind, shift):
    cfg, params, _ = cut
    cfg = dataclasses.replace(cfg, right_shift=shift)
    objective = dataclasses.replace(OBJECTIVE, kind=kind)

    def slow(params):
        return sum(reference(cfg, params, None, batch, draws, objective)[0]), None

    loss_fn = model_loss(cfg, objective, remat=False)
    (total, metrics), grads = with_gradient(loss_fn)(params, {}, batch, draws)
    (expected, _), slow_grads = with_gradient(slow)(params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, total / ROWS, rtol=1e-6)
    assert_trees_close(grads, slow_grads)


def test_the_causal_loss_is_the_mean_of_the_next_tokens(cut, batch, draws):
    cfg, params, _ = cut
    cfg = dataclasses.replace(cfg, causal=True, mask_id=None)
    objective, answer = ObjectiveConfig(kind="causal"), np.asarray(batch.answer)

    def slow(params):
        h = transformer.run_layers(cfg, params, batch.tokens, batch.valid).h
        log_p = jax.nn.log_softmax(transformer.head_logits(cfg, params, h))
        rows = []
        for row in range(ROWS):
            places = np.flatnonzero(answer[row])  # prompts come before
            rows.append(-log_p[row, places - 1, batch.tokens[row, places]].mean())
        return sum(rows), None

    loss_fn = model_loss(cfg, objective, remat=False)
    (_, metrics), grads = with_gradient(loss_fn)(params, {}, batch, draws)
    (expected, _), slow_grads = with_gradient(slow)(params)
    np.testing.assert_allclose(metrics["loss"].value, expected / ROWS, rtol=1e-5)
    assert_trees_close(grads, slow_grads)


@pytest.mark.parametrize("part", ["layers", "final_norm"])
def test_a_model_with_time_conditioning_is_told_the_time(part, batch, draws):
    small = {"num_blocks": 1, "d_model": 16, "head_dim": 8, "vocab_size": 64, "mask_id": 63}
    cfg = families.mdlm_small(**small, eos_id=1, pad_id=0, dtype="float32", time_conditioning=True)
    # Modulations start at zero, where no time can show.
    params = trees.map_named(
        lambda name, x: x + 0.1 if name.startswith(part) and "modulation" in name else x,
        init_params(cfg),
    )

    def loss(time_conditioning):
        changed = dataclasses.replace(cfg, time_conditioning=time_conditioning)
        loss_fn = jax.jit(model_loss(changed, ObjectiveConfig(kind="mdlm"), remat=False))
        return loss_fn(params, {}, batch, draws)[0]

    assert loss(True) != loss(False)


@pytest.mark.parametrize("kind, causal", [("causal", False), ("llada", True), ("mdlm", True)])
def test_an_objective_for_another_kind_of_model_is_refused(cfg, kind, causal):
    cfg = dataclasses.replace(cfg, causal=causal)
    with pytest.raises(InputError, match=f"objective.kind='{kind}' does not fit"):
        check_objective(cfg, ObjectiveConfig(kind=kind))


def test_routers_of_a_causal_model_are_refused(cfg):
    cfg = dataclasses.replace(cfg, causal=True)
    with pytest.raises(InputError, match="masked diffusion backbone"):
        check_objective(cfg, ObjectiveConfig(kind="causal"), routers=True)


def test_recomputing_blocks_changes_no_gradient(cut, batch, draws):
    cfg, params, routers = cut

    def grads(remat):
        loss_fn = router_loss(cfg, ROUTER, OBJECTIVE, remat)
        return with_gradient(loss_fn)(routers, params, batch, draws)[1]

    assert_trees_close(grads(True), grads(False))


def test_a_row_without_masked_tokens_contributes_nothing(cut, batch, draws):
    cfg, params, routers = cut
    nothing = batch._replace(answer=jnp.zeros_like(batch.answer))
    loss_fn = router_loss(cfg, ROUTER, OBJECTIVE, remat=False)
    (_, metrics), grads = with_gradient(loss_fn)(routers, params, nothing, draws)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert metrics["loss"].value == 0
    assert metrics["skip_rate"].count == 0  # nor does it dilute the mean


def test_lambda_weighs_the_skip_loss_alone(cut, batch, draws):
    cfg, params, routers = cut

    def loss(skip_weight):
        objective = ObjectiveConfig(min_mask_ratio=0.2, skip_weight=skip_weight)
        loss_fn = jax.jit(router_loss(cfg, ROUTER, objective, remat=False))
        return float(loss_fn(routers, params, batch, draws)[0])

    none, one, three = loss(0.0), loss(1.0), loss(3.0)
    assert one > none
    assert three - none == pytest.approx(3 * (one - none), rel=1e-4)


def test_merged_means_are_by_weight_and_none_is_of_nothing():
    masked, unmasked = Mean(np.float32(6), np.float32(3)), Mean(np.float32(0), np.float32(0))
    one = {"ce": masked, "share": unmasked}
    two = {"ce": Mean(np.float32(2), np.float32(1)), "share": unmasked}
    assert merge_metrics([one, two, {"ce": unmasked, "share": unmasked}]) == {"ce": 2.0}
    assert merge_metrics([{"ce": masked}, {"ce": Mean(np.float32(9), np.float32(1))}]) == {
        "ce": 3.75
    }
