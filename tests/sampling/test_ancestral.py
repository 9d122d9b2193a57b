"""MDLM's sampler against the enumerated chain of a toy model, and what it costs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import compiling
from dials_jax.caching.plain import DualCache
from dials_jax.errors import InputError
from dials_jax.models import families
from dials_jax.models.model import Model
from dials_jax.sampling import ancestral
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.skipping.policies import Random
from dials_jax.skipping.routed import Routed
from tests.conftest import amplify, init_params

NUM_SAMPLES, ROWS = 1 << 17, 1 << 14
V, G, TOY_MASK = 3, 3, 3  # tokens, places and [MASK] of the toy model


def loud(cfg, factor, seed=0):
    """A random model whose weights are so large that tokens matter to each other."""
    return Model(cfg, amplify(init_params(cfg, seed), factor))


@pytest.fixture(scope="module")
def toy():
    cfg = families.llada_small(
        1, 8, V + 1, TOY_MASK, 0, 0, head_dim=4, max_length=G, dtype="float32", d_ff=8
    )
    return loud(cfg, 30)


@pytest.fixture(scope="module")
def timed():
    """A model that is told the time."""
    cfg = families.mdlm_small(
        2, 32, 64, 63, 1, 0, head_dim=8, max_length=64, dtype="float32", time_conditioning=True
    )
    model = loud(cfg, 8)
    layers = model.params["layers"]
    noise = jax.random.normal(jax.random.key(5), layers["modulation"]["kernel"].shape)
    modulation = {**layers["modulation"], "kernel": noise}
    return Model(cfg, {**model.params, "layers": {**layers, "modulation": modulation}})


@pytest.fixture
def optimized(monkeypatch):
    """Programs that run for seconds are worth optimising, unlike those of other tests."""
    options = {"xla_backend_optimization_level": 1}  # 3 takes longer to compile, and runs no faster
    monkeypatch.setattr(compiling, "compiler_options", lambda: options)


def chain(model, steps):
    """The exact distribution over texts: all canvases, step after step."""
    canvases = np.array(list(itertools.product(range(V + 1), repeat=G)))
    number = {tuple(c): i for i, c in enumerate(canvases)}
    logits = np.asarray(model.apply(canvases).logits, np.float64)[..., :V]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    times = np.append(np.linspace(1, ancestral.EPS, steps + 1)[:-1], 0)  # the last reveals all
    moves = []  # from, to, tokens revealed, tokens left, probability of the tokens
    for i, canvas in enumerate(canvases):
        choices = [range(V + 1) if c == TOY_MASK else [c] for c in canvas]
        for after in itertools.product(*choices):
            new = [j for j in range(G) if canvas[j] == TOY_MASK and after[j] < V]
            left = after.count(TOY_MASK)
            moves.append(
                (i, number[after], len(new), left, np.prod([p[i, j, after[j]] for j in new]))
            )
    start, end, new, left, weight = (np.array(x) for x in zip(*moves, strict=True))
    state = np.zeros(len(canvases))
    state[number[(TOY_MASK,) * G]] = 1
    for t, s in itertools.pairwise(times):
        reveal = (t - s) / t
        after = np.zeros_like(state)
        np.add.at(after, end, state[start] * weight * reveal**new * (1 - reveal) ** left)
        state = after
    whole = (canvases < V).all(axis=1)
    assert state[whole].sum() == pytest.approx(1)
    return state[whole]


def histogram(model, sampler, num_samples=NUM_SAMPLES):
    count = np.zeros(V**G)
    for batch in range(num_samples // ROWS):
        key = jax.random.fold_in(jax.random.key(0), batch)
        out = generate(model, None, sampler=sampler, num_sequences=ROWS, key=key)
        assert (out.tokens < V).all()
        count += np.bincount(out.tokens @ V ** np.arange(G)[::-1], minlength=V**G)
    return count / num_samples


def distance(p, q):
    return np.abs(p - q).sum() / 2


def sampling_error(law, num_samples):
    """A distance that samples of the law itself keep, but for one time in ten thousands."""
    draws = np.random.default_rng(0).multinomial(num_samples, law, 200) / num_samples
    distances = np.abs(draws - law).sum(axis=1) / 2
    return distances.mean() + 4 * distances.std()


# ----------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("steps", [4, 16, 250])
@pytest.mark.usefixtures("optimized")
def test_samples_follow_the_enumerated_chain(toy, steps):
    law = chain(toy, steps)
    assert distance(law, chain(toy, 1)) > 0.1  # else any order of revealing would pass
    error = sampling_error(law, NUM_SAMPLES)
    assert distance(histogram(toy, Ancestral(G, steps)), law) < error


@pytest.mark.usefixtures("optimized")
def test_first_hitting_is_the_limit_of_many_steps(toy):
    law = chain(toy, 4000)
    sampler = Ancestral(G, G, first_hitting=True)
    assert distance(histogram(toy, sampler), law) < sampling_error(law, NUM_SAMPLES)


@pytest.mark.usefixtures("optimized")
def test_the_published_sampler_follows_the_chain_where_its_grid_is_fine(toy):
    num_samples, law = 1 << 15, chain(toy, 4)
    samples = histogram(toy, Ancestral(G, 4, precision="float32"), num_samples)
    assert distance(samples, law) < sampling_error(law, num_samples)
    assert sampling_error(law, num_samples) < distance(law, chain(toy, 1)) / 4


def test_times_fall_into_steps_by_their_length():
    # From 1 to 0.5, to eps, and then on to 0 in the same step; in units of 2^-32.
    sampler = Ancestral(4, 2)
    drawn = jnp.array([[0, 2**31 - 2**20, 2**31 + 2**20, 2**32 - 1]], jnp.uint32)
    np.testing.assert_array_equal(ancestral.step_of(sampler.times, drawn), [[1, 1, 0, 0]])
    assert sampler.times[1] == pytest.approx(0.5, abs=1e-5)


def zipf_model(num_tokens):
    """Says of every token, whatever it sees, how often it is: as 1 / rank."""
    cfg = families.mdlm_small(
        1, 8, num_tokens + 1, num_tokens, 0, 0, head_dim=4, max_length=64, dtype="float32"
    )
    params = init_params(cfg)
    p = 1 / np.arange(1, num_tokens + 1)
    p /= p.sum()
    bias = np.append(np.log(p), 0.0).astype(np.float32)
    head = {"kernel": np.zeros_like(params["head"]["kernel"]), "bias": bias}
    return Model(cfg, {**params, "head": head}), p


def test_published_noise_has_less_entropy(monkeypatch):
    """Trap 1 on a grid of 2^-12, where 16 steps and 512 tokens show what 2^-24 does to 1,000 steps
    and 50,258 tokens."""
    model, p = zipf_model(512)
    surprise = -np.log(p)
    expected, deviation = p @ surprise, np.sqrt(p @ surprise**2 - (p @ surprise) ** 2)

    def measured(sampler, num_sequences):
        out = generate(model, None, sampler=sampler, num_sequences=num_sequences)
        return surprise[out.tokens].mean(), 4 * deviation / np.sqrt(out.tokens.size)

    mean, error = measured(Ancestral(64, 16), 16)
    assert abs(mean - expected) < error
    monkeypatch.setattr(ancestral, "UNIFORM_BITS", 12)
    mean, error = measured(Ancestral(64, 16, precision="float32"), 15)
    assert mean < expected - 2 * error


@pytest.mark.parametrize("bits", [24, 12])
def test_coarse_noise_weighs_as_predicted(monkeypatch, bits):
    # A token of weight w = 2^-12 against [MASK] of weight 1 on a grid of 2^-b. Its noise is k 2^-b,
    # k >= 1, and it wins with probability exp(-k a) where a = 2^-b / w: in all 2^-b / (e^a - 1).
    monkeypatch.setattr(ancestral, "UNIFORM_BITS", bits)
    w, size = 2.0**-12, 1 << 22
    noise = ancestral.coarse_exponential(jax.random.key(0), (2, size))
    wins = float(jnp.sum(w / noise[0] > 1 / noise[1]))
    expected = size * 2.0**-bits / np.expm1(2.0**-bits / w)
    assert abs(wins - expected) < 4 * np.sqrt(expected)


# ------------------------------------------------------------------------------------------ calls


def keys_of(num_sequences, seed=7):
    return jax.random.split(jax.random.key(seed), num_sequences)


def test_full_slots_take_more_calls_and_change_nothing(lively):
    settings = {"num_sequences": 4, "key": keys_of(4)}
    roomy = generate(lively, None, sampler=Ancestral(16, 5, slots=16), **settings)
    tight = generate(lively, None, sampler=Ancestral(16, 5, slots=2), **settings)
    np.testing.assert_array_equal(tight.tokens, roomy.tokens)
    assert roomy.nfe == 5 < tight.nfe


def test_steps_that_reveal_nothing_make_no_call(lively):
    alone = generate(lively, None, sampler=Ancestral(8, 1000), num_sequences=1)
    assert 7 <= alone.nfe <= 8  # two of 8 tokens rarely share one of 1,000 steps
    share = alone.masked_share[:, 0]
    assert share[0] == 1 and (np.diff(share) < 0).all()
    many = generate(lively, None, sampler=Ancestral(8, 1000), num_sequences=64)
    assert many.nfe == 8  # each row at its own pace


def test_a_row_that_waits_for_the_others_has_nothing_masked(lively):
    sampler, keys = Ancestral(8, 6), keys_of(6)
    out = generate(lively, None, sampler=sampler, num_sequences=6, key=keys)
    calls = []
    for row in range(6):
        alone = generate(lively, None, sampler=sampler, num_sequences=1, key=keys[row : row + 1])
        share = np.pad(alone.masked_share[:, 0], (0, out.nfe - alone.nfe))
        np.testing.assert_array_equal(out.masked_share[:, row], share)
        calls.append(alone.nfe)
    assert min(calls) < max(calls) == out.nfe
    assert out.passes.tolist() == calls


def test_first_hitting_reveals_one_token_a_call(lively):
    sampler = Ancestral(12, 12, first_hitting=True)
    out = generate(lively, None, sampler=sampler, num_sequences=3)
    assert out.nfe == 12
    expected = np.tile(np.arange(12, 0, -1)[:, None] / 12, (1, 3))
    np.testing.assert_allclose(out.masked_share, expected)


def test_published_steps_all_make_a_call_and_one_more_finishes(lively):
    out = generate(lively, None, sampler=Ancestral(16, 6, precision="float32"), num_sequences=3)
    assert out.nfe == 7
    np.testing.assert_array_equal(out.steps, np.arange(7))
    assert not (out.tokens == lively.config.mask_id).any()


@pytest.mark.parametrize(
    "kind, sampler",
    [
        ("lively", Ancestral(16, 10)),
        ("timed", Ancestral(16, 10)),
        ("timed", Ancestral(16, 16, first_hitting=True)),
        ("lively", Ancestral(16, 10, precision="float32")),
    ],
    ids=["steps", "steps and times", "first hitting", "float32"],
)
def test_a_row_alone_equals_the_row_in_a_padded_batch(request, sampler, kind):
    model = request.getfixturevalue(kind)
    prompts = np.random.default_rng(0).integers(2, 60, (3, 6))
    valid = np.arange(6) >= np.arange(3)[:, None]
    batch = generate(model, prompts, valid, sampler=sampler, key=keys_of(3))
    alone = generate(model, prompts[2:, 2:], sampler=sampler, key=keys_of(3)[2:])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[2, 2:])
    np.testing.assert_array_equal(batch.tokens[:, :6], prompts)
    assert not (batch.tokens == model.config.mask_id).any()


def test_time_reaches_the_model(timed):
    still = Model(dataclasses.replace(timed.config, time_conditioning=False), timed.params)
    settings = {"sampler": Ancestral(16, 8), "num_sequences": 4}
    told, untold = (generate(m, None, **settings).tokens for m in (timed, still))
    assert (told != untold).any()


def test_predictions_of_a_shifted_model_are_those_of_the_token_before(lively):
    # One token after a prompt: the only call sees the prompt, and its prediction is `apply`'s.
    cfg = dataclasses.replace(lively.config, right_shift=True)
    kernel = 50 * lively.params["head"]["kernel"]  # leaves no choice
    model = Model(cfg, {**lively.params, "head": {"kernel": kernel}})
    prompts = np.random.default_rng(0).integers(2, 60, (3, 6))
    out = generate(model, prompts, sampler=Ancestral(1, 4))
    blank = np.concatenate([prompts, np.full((3, 1), cfg.mask_id)], axis=1)
    logits = model.apply(blank).logits[:, -1].at[:, cfg.mask_id].set(-jnp.inf)
    np.testing.assert_array_equal(out.tokens[:, -1], jnp.argmax(logits, axis=-1))


def test_rows_decide_alone_which_layers_run(lively, routers):
    settings = {"sampler": Ancestral(16, 10), "policy": Routed(routers, 0.3)}
    out = generate(lively, None, num_sequences=3, key=keys_of(3), **settings)
    reference = generate(
        lively, None, num_sequences=3, key=keys_of(3), **settings, executor="select"
    )
    np.testing.assert_array_equal(out.tokens, reference.tokens)
    np.testing.assert_array_equal(out.gates, reference.gates)
    assert out.gates.any() and not out.gates.all() and out.flops.model < 1


def test_random_layers_do_not_depend_on_the_batch(lively):
    settings = {"sampler": Ancestral(16, 10), "policy": Random(2), "executor": "select"}
    batch = generate(lively, None, num_sequences=3, key=keys_of(3), **settings)
    alone = generate(lively, None, num_sequences=1, key=keys_of(3)[1:2], **settings)
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[1])
    assert len({gates.tobytes() for gates in batch.gates[..., 1]}) > 1


@pytest.mark.parametrize(
    "sampler",
    [Ancestral(16, 6), Ancestral(16, 6, slots=2), Ancestral(16, 16, first_hitting=True)],
    ids=["steps", "full slots", "first hitting"],
)
def test_each_model_reveals_the_tokens_of_its_own_steps(sampler):
    model, _ = zipf_model(8)

    def saying(token):
        head = {**model.params["head"], "bias": 50.0 * jax.nn.one_hot(token, 9)}
        return Model(model.config, {**model.params, "head": head})

    keys, last = keys_of(5), sampler.steps - 3
    out = generate(
        {"A": saying(3), "B": saying(5)}, None, num_sequences=5, key=keys, sampler=sampler,
        schedule=Schedule.parse(f"A2,B{last - 1},A2"),
    )  # fmt: skip
    noise_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    plan = ancestral.draw_reveal_plan(sampler, noise_keys, 0)
    step, ends = plan.step, np.array([0, 2, last + 1, sampler.steps])
    in_the_middle = (step >= 2) & (step <= last)
    assert in_the_middle.any() and not in_the_middle.all()
    np.testing.assert_array_equal(out.tokens, jnp.where(in_the_middle, 5, 3))
    # Rows wait for each other at the end of a run, and every call is counted in its own.
    calls = np.diff(plan.calls_before[:, ends], axis=1).max(axis=0)
    np.testing.assert_array_equal(np.histogram(out.steps, ends - 0.5)[0], calls)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 0, "steps": 4}, "length=0 must be positive"),
        ({"length": 4, "steps": 8, "first_hitting": True}, "set steps=4"),
        ({"length": 4, "steps": 4, "slots": 0}, "slots=0 must be positive"),
        (
            {"length": 4, "steps": 4, "first_hitting": True, "precision": "float32"},
            "leave out precision='float32'",
        ),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Ancestral(**settings)


def test_what_cannot_be_sampled_so_is_refused(lively):
    sampler = Ancestral(8, 4)
    with pytest.raises(InputError, match="leave out `cache`"):
        generate(lively, None, sampler=sampler, num_sequences=1, cache=DualCache())
    with pytest.raises(InputError, match="give num_sequences"):
        generate(lively, None, sampler=sampler)
    with pytest.raises(InputError, match="num_sequences=3 and 2 prompts"):
        generate(lively, np.full((2, 4), 5), sampler=sampler, num_sequences=3)
    causal = dataclasses.replace(lively.config, causal=True, mask_id=None)
    with pytest.raises(InputError, match="give a masked diffusion model"):
        generate(Model(causal, lively.params), None, sampler=sampler, num_sequences=1)
