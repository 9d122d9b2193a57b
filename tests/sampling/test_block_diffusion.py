"""Block-causal models generate their authors' tokens: SDAR and Fast-dLLM v2, with their caches."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching import sub_blocks
from dials_jax.caching.cache import Blocks, ForwardInputs
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.errors import InputError
from dials_jax.evaluation.batched import generation_batches
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.model import Model, sequence_keys
from dials_jax.sampling import generate as generating
from dials_jax.sampling.block_diffusion import BlockDiffusion
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.infill import infill
from dials_jax.sampling.refill import why_not_refilled
from dials_jax.sampling.reveal import StepInfo
from dials_jax.skipping.policies import Static
from dials_jax.skipping.routed import Routed
from tests.conftest import random_routers

GOLDEN = Path(__file__).parents[1] / "golden"
MASK = 190


class Golden:
    """A family's published values, and its model. The configuration of Fast-dLLM v2 has the tiny
    model's [MASK] added, since the published one does not name it."""

    def __init__(self, name):
        self.values, self.model = np.load(GOLDEN / name / "golden.npz"), load(GOLDEN / name)
        self.prompts = [x for key, x in self.values.items() if key.startswith("prompt_")]

    def __getitem__(self, name):
        return self.values[name]

    def args(self, name):
        return json.loads(str(self[f"{name}_args"]))

    def ending_at(self, eos_id):
        return Model(dataclasses.replace(self.model.config, eos_id=eos_id), self.model.params)


@pytest.fixture(scope="module")
def sdar():
    return Golden("sdar_tiny")


@pytest.fixture(scope="module")
def fast():
    return Golden("fast_dllm_v2_tiny")


def sdar_run(sdar, number):
    """The prompt and sampler of a published run, which fills its last block."""
    args = sdar.args(f"generate_{number}")
    prompt, theirs = sdar[f"prompt_{args['prompt']}"], sdar[f"generate_{number}"]
    threshold = args.get("threshold")
    if args.get("remasking_strategy") == "low_confidence_dynamic":
        threshold = 0.0  # confidences after top_k=1 are all 1
    sequential = args.get("remasking_strategy") == "sequential"
    sampler = BlockDiffusion(
        theirs.shape[1] - len(prompt),
        args["block_length"],
        args["denoising_steps"],
        "sequential" if sequential else "low_confidence",
        threshold,
        stop_ids=tuple(args["stop_ids"]),
    )
    return prompt, sampler


def fast_run(fast, name, prompt):
    """The model and sampler of a published run, which generates one token more than its blocks."""
    args = fast.args(name)
    block = args["block_size"]
    blocks = len(prompt) // block + args["max_new_tokens"] // block
    sampler = BlockDiffusion(
        blocks * block + 1 - len(prompt),
        block,
        threshold=float(args["threshold"]),
        sub_block_length=args["small_block_size"],
        stop_at_eos=True,
    )
    cache = DualCache() if args["use_block_cache"] else PrefixCache()
    return fast.ending_at(args["stop_token"]), sampler, cache


@pytest.mark.parametrize("number", range(8))
def test_sdar_gives_the_authors_tokens_call_by_call(sdar, number):
    prompt, sampler = sdar_run(sdar, number)
    out = generate(sdar.model, prompt[None], sampler=sampler, cache=PrefixCache())
    theirs = sdar[f"generate_{number}"]
    filled = theirs != MASK  # the published canvas keeps [MASK] behind the block that ends it
    assert filled.all() == (number != 4)
    np.testing.assert_array_equal(out.tokens[filled], theirs[filled])
    assert (out.tokens[~filled] == sdar.model.config.eos_id).all()
    assert out.nfe == out.passes[0] == sdar[f"generate_{number}_nfe"]
    np.testing.assert_array_equal(out.tokens_run[:, 0], sdar[f"generate_{number}_call_lengths"])


@pytest.mark.parametrize("number", range(7))
def test_fast_dllm_v2_gives_the_authors_tokens_call_by_call(fast, number):
    prompt = fast[f"prompt_{fast.args(f'generate_{number}')['prompt']}"]
    model, sampler, cache = fast_run(fast, f"generate_{number}", prompt)
    out = generate(model, prompt[None], sampler=sampler, cache=cache)
    theirs = fast[f"generate_{number}"]
    length = theirs.shape[1]  # cut behind the end of text
    assert (length == out.tokens.shape[1]) == (number != 5)
    np.testing.assert_array_equal(out.tokens[:, :length], theirs)
    assert out.num_tokens[0] == length - len(prompt)
    assert out.nfe == out.passes[0] == fast[f"generate_{number}_nfe"]
    np.testing.assert_array_equal(out.tokens_run[:, 0], fast[f"generate_{number}_call_lengths"])


@pytest.mark.parametrize("number, cached", [(0, True), (0, False), (1, True)])
def test_a_ragged_batch_of_fast_dllm_v2_is_each_of_its_prompts(fast, number, cached):
    """The authors' batches give shorter prompts more tokens, and padding behind a stop."""
    args = fast.args(f"batch_{number}")
    prompts = [fast[f"prompt_{i}"] for i in args["prompts"]]
    model, sampler, cache = fast_run(fast, f"batch_{number}", prompts[0])
    out = generate(model, prompts, sampler=sampler, cache=cache if cached else None)
    width = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        ours, theirs = out.tokens[row, width - len(prompt) :], fast[f"batch_{number}_{row}"]
        length = min(len(prompt) + out.num_tokens[row], len(theirs))
        np.testing.assert_array_equal(ours[:length], theirs[:length])
    assert len(set(out.passes)) > 1


def test_logits_of_fast_dllm_v2_are_the_authors_shifted(fast):
    for name, block in (("logits", 16), ("logits_block32", 32)):
        cfg = dataclasses.replace(fast.model.config, block_length=block)
        logits = Model(cfg, fast.model.params).apply(fast["input_ids"]).logits
        np.testing.assert_allclose(logits[:, 1:], fast[name][:, :-1], rtol=0, atol=2e-4)
    prefix = int(fast["noisy_prefix_length"])
    noisy = np.concatenate([fast["input_ids"][:, :prefix], fast["noisy_block"]], axis=1)
    logits = fast.model.apply(noisy).logits[:, prefix + 1 :]
    np.testing.assert_allclose(logits, fast["noisy_logits"][:, :-1], rtol=0, atol=2e-4)


def test_a_sub_block_reads_what_the_last_whole_call_left(fast, monkeypatch):
    """The authors' logits of the third sub-block, of which other tokens are known by then."""
    prefix, place = int(fast["noisy_prefix_length"]), int(fast["sub_position"])
    canvas = np.concatenate([fast["input_ids"][:, :prefix], fast["noisy_block"]], axis=1)
    later = canvas.copy()
    later[:, prefix + place : prefix + place + 4] = fast["sub_ids"]
    cfg, params = fast.model.config, fast.model.params
    blocks = Blocks(prefix, 16, 1, None, appended=True, causal=True, part=4)
    monkeypatch.setattr(sub_blocks, "current_part", lambda masked, _: jnp.full(2, place // 4))

    @jax.jit
    def run(canvas, later):
        inputs, number = transformer.block_inputs(cfg, None, canvas.shape), jnp.asarray
        net = CanvasModel(cfg, params, None, "auto", inputs, None, None, 0)
        state, logits = DualCache().init_state(net, blocks), []
        variants = DualCache().forward_variants(net, blocks)
        for step, variant, tokens in zip(
            (-1, 0, 1), variants, (canvas, canvas, later), strict=True
        ):
            at = number(step), number(0), number(step)
            inputs = ForwardInputs(tokens, *at, jnp.ones(2, bool))
            out = variant.forward(inputs, state)
            state = out.cache_state
            logits.append(transformer.head_logits(cfg, params, out.h))
        return logits

    _, whole, part = run(canvas, later)
    np.testing.assert_allclose(whole, fast["sub_full_logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(part, fast["sub_logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["sdar", "fast"])
def test_padding_on_the_left_changes_no_logits(name, request):
    golden = request.getfixturevalue(name)
    tokens = golden["input_ids"][:, :21]
    padded = np.pad(tokens, ((0, 0), (3, 0)), constant_values=7)
    valid = np.broadcast_to(np.arange(24) >= 3, padded.shape)
    expected = golden.model.apply(tokens).logits
    logits = golden.model.apply(padded, valid).logits[:, 3:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


# ------------------------------------------------------------------ what a sequence depends on


@pytest.mark.parametrize("family", ["sdar", "fast"])
def test_each_sequence_of_a_padded_batch_is_what_it_is_alone(family, request):
    """Drawn tokens, gates, log-probabilities and calls, too; one prompt fills no block."""
    golden, shifted = request.getfixturevalue(family), family == "fast"
    policy = Routed(random_routers(golden.model.config), 0.4)
    sampler = BlockDiffusion(
        11, 8, threshold=0.1, temperature=0.5, sub_block_length=4 if shifted else None
    )
    run = {
        "sampler": sampler,
        "cache": DualCache() if shifted else PrefixCache(),
        "policy": policy,
        "trajectory": True,
    }
    prompts = [golden.prompts[0][:n] for n in (9, 3)]
    keys = sequence_keys(jax.random.key(3), 2)
    together = generate(golden.model, prompts, key=keys, **run)
    for row, prompt in enumerate(prompts):
        alone = generate(golden.model, prompt[None], key=keys[row : row + 1], **run)
        np.testing.assert_array_equal(together.tokens[row, 9:], alone.tokens[0, len(prompt) :])
        np.testing.assert_allclose(together.log_probs[row], alone.log_probs[0], atol=2e-4)
        assert together.passes[row] == alone.nfe
        own = together.gates[together.own[:, row], :, row]
        np.testing.assert_array_equal(own, alone.gates[:, :, 0])
        np.testing.assert_array_equal(alone.trajectory.tokens[-1], alone.tokens)
        stores = alone.masked_share[:, 0] == 0
        assert stores.sum() > 1 and alone.gates[stores].all()  # later calls read what they store
    assert not together.own.all() and not together.gates.all()


def test_finished_blocks_that_are_cached_are_exact(sdar):
    """Without a cache there is nothing to store, and no call for it; Fast-dLLM v2: see above."""
    prompt, sampler = sdar_run(sdar, 3)
    out = generate(sdar.model, prompt[None], sampler=sampler)
    np.testing.assert_array_equal(out.tokens, sdar["generate_3"])
    lengths = sdar["generate_3_call_lengths"]
    assert out.nfe == len(lengths) - 1 - 4  # of the prompt, and of four blocks
    assert out.tokens_run[:, 0].sum() > lengths.sum()


def test_a_step_reveals_what_is_above_the_threshold_and_a_quota(sdar):
    """Of the first part with masked tokens; the next block's first token by itself."""
    unknown = -np.inf
    confidence = np.array(
        [
            [unknown, 0.5, 0.3, 0.6, 0.9],  # 0.5 is not above 0.5, and the best one is revealed
            [unknown, unknown, 0.7, 0.6, 0.9],
            [unknown, unknown, unknown, unknown, 0.1],
        ]
    )
    info = StepInfo(
        jnp.asarray(0),
        jnp.zeros(3, int),
        jnp.zeros(3, int),
        jnp.broadcast_to(jnp.arange(5), (3, 5)),
    )
    expected = {
        BlockDiffusion(8, 4, threshold=0.5): [[0, 0, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
        BlockDiffusion(8, 4, threshold=0.2, sub_block_length=2): [
            [0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
        ],
        BlockDiffusion(8, 4, 3): [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
        BlockDiffusion(8, 4, 4, "sequential"): [
            [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1],
        ],
    }  # fmt: skip
    for sampler, chosen in expected.items():
        found = sampler.choose(jnp.asarray(confidence, jnp.float32), info, jax.random.key(0))
        np.testing.assert_array_equal(found, np.array(chosen, bool), err_msg=str(sampler))


@pytest.mark.parametrize("bound", [0.0, 1.0, 6.0, 1e3])
def test_an_entropy_bound_reveals_what_adds_up_to_less(sdar, bound):
    """As many tokens as have less entropy than this together, and one at least."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 8, 200)) * rng.uniform(1, 6, size=(3, 8, 1))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    masked, expected = rng.random((3, 8)) < 0.7, np.zeros((3, 8), bool)
    for row, entropies in enumerate(-(p * np.log(p)).sum(axis=-1)):
        total = 0.0
        for place in sorted(np.flatnonzero(masked[row]), key=lambda i: entropies[i]):
            total += entropies[place]
            if total >= bound and expected[row].any():
                break
            expected[row, place] = True
    sampler = BlockDiffusion(16, 8, entropy_bound=bound)
    zero = jnp.zeros(3, int)
    info = StepInfo(zero[0], zero, zero, jnp.broadcast_to(jnp.arange(8), (3, 8)))
    _, confidence = sampler.propose(sdar.model.config, jnp.asarray(logits, jnp.float32), zero)
    confidence = jnp.where(masked, confidence, -jnp.inf)
    found = sampler.choose(confidence, info, zero)
    np.testing.assert_array_equal(found, expected)


def test_all_that_the_prompts_call_ends_takes_no_other_call(fast):
    """It gives the token behind a prompt of whole blocks: the only one asked for, or the end."""
    [prompt] = [p for p in fast.prompts if len(p) == 16]
    out = generate(fast.model, prompt[None], sampler=BlockDiffusion(1, 16), cache=PrefixCache())
    assert out.nfe == out.passes[0] == 1 and (out.tokens[:, :16] == prompt).all()
    model, ends = fast.ending_at(int(out.tokens[0, -1])), BlockDiffusion(20, 16, stop_at_eos=True)
    ended = generate(model, prompt[None], sampler=ends, cache=PrefixCache())
    assert ended.nfe == 1 and ended.num_tokens[0] == 1
    assert (ended.tokens[:, 16:] == model.config.eos_id).all()


@pytest.mark.parametrize("family", ["sdar", "fast"])
def test_leaving_layers_out_is_a_model_without_them(family, request):
    golden, shifted = request.getfixturevalue(family), family == "fast"
    cfg, params = golden.model.config, golden.model.params
    kept = jax.tree.map(lambda x: x[np.array([0, 2])], params["layers"])
    shallow = Model(dataclasses.replace(cfg, num_layers=2), {**params, "layers": kept})
    sampler = BlockDiffusion(20, 8, threshold=0.2, sub_block_length=4 if shifted else None)
    run = {"sampler": sampler, "cache": DualCache()}
    skipped = generate(golden.model, golden.prompts[:2], policy=Static((1, 3)), **run)
    expected = generate(shallow, golden.prompts[:2], **run)
    np.testing.assert_array_equal(skipped.tokens, expected.tokens)
    assert skipped.flops.layers_run == 0.5 and skipped.nfe == expected.nfe


def test_a_prompt_of_exactly_one_block_counts(fast):
    """In the published code it is ignored."""
    [prompt] = [p for p in fast.prompts if len(p) == 16]
    sampler = BlockDiffusion(4, 16, threshold=0.2)
    outs = [
        generate(fast.model, p[None], sampler=sampler, cache=PrefixCache()).tokens[0, 16:]
        for p in (prompt, prompt[::-1])
    ]
    assert (outs[0] != outs[1]).any()


def test_an_end_of_text_in_the_prompt_ends_nothing(sdar):
    """The prompt's last tokens share a block with the answer, as the end of a user's turn does."""
    prompt, sampler = sdar_run(sdar, 1)
    end = int(prompt[-1])
    assert len(prompt) % 4 and end not in sdar["generate_1"][0, len(prompt) :]
    ends = dataclasses.replace(sampler, stop_at_eos=True, stop_ids=(end,))
    out = generate(sdar.ending_at(end), prompt[None], sampler=ends, cache=PrefixCache())
    np.testing.assert_array_equal(out.tokens, sdar["generate_1"])


def test_prompts_of_one_bucket_share_a_program(sdar, traced_once):
    prompts = [sdar.prompts[0][:n] for n in (3, 5, 8, 10)]
    traced_once(generating, "generate_program")
    run = {"sampler": BlockDiffusion(5, 4), "cache": PrefixCache(), "bucket": 12}
    batches = list(generation_batches(sdar.model, prompts, batch_size=2, **run))
    assert len(batches) == 2 and all(b.answers.shape == (2, 5) for b in batches)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps_per_block": 9}, "steps_per_block=9: a block of block_length=8 has no token"),
        ({"sub_block_length": 3}, "sub_block_length=3 must divide block_length=8"),
        ({"sub_block_length": 4, "steps_per_block": 4}, "sub_block_length=4 knows no quota"),
        ({"threshold": 0.5, "remasking": "sequential"}, "leave out one of them"),
        ({"threshold": -0.5}, "threshold=-0.5 must not be negative"),
        ({"threshold": 0.5, "entropy_bound": 0.35}, "entropy_bound is a rule of its own"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_compose_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        BlockDiffusion(16, 8, **settings)


def test_what_has_no_meaning_here_is_refused(sdar, fast, model):
    sampler, prompts = BlockDiffusion(8, 4), sdar.prompts[:1]
    with pytest.raises(InputError, match=r"block-causal model \(sdar\) generates by BlockDiff"):
        generate(sdar.model, prompts, sampler=Confidence(4))
    with pytest.raises(InputError, match=r"block-causal model \(sdar\) generates by BlockDiff"):
        infill(sdar.model, [[3, MASK]])
    with pytest.raises(InputError, match="and llada is none; take Confidence"):
        generate(model, [[3]], sampler=sampler)
    with pytest.raises(InputError, match="EarlySkip follows a canvas that every token sees"):
        generate(sdar.model, prompts, sampler=sampler, cache=EarlySkip())
    with pytest.raises(InputError, match="a block's first token comes out of the block before it"):
        generate(fast.model, [[3]], sampler=BlockDiffusion(8, 1))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate(fast.model, [[3], []], sampler=sampler, cache=PrefixCache())
    with pytest.raises(InputError, match="stop_ids has 200, outside the vocabulary"):
        generate(sdar.model, prompts, sampler=BlockDiffusion(8, 4, stop_ids=(200,)))
    assert "counts its blocks" in why_not_refilled(sampler, None, sdar.model.config)
