"""The caches give the tokens of the published code on a tiny LLaDA."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.early_skip import importance, variants
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.loading import load
from dials_jax.sampling import generate as generating
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_tiny"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def golden_model():
    return load(GOLDEN)


FAST = [
    ("threshold", NoCache()),
    ("prefix", PrefixCache()),
    ("prefix_threshold", PrefixCache()),
    ("dual", DualCache()),
    ("dual_threshold", DualCache()),
]


@pytest.mark.parametrize("name, cache", FAST)
def test_fast_dllm_gives_the_same_tokens_in_as_many_calls(golden, golden_model, name, cache):
    sampler = Confidence(**json.loads(str(golden[f"fast_{name}_args"])))
    out = generate(golden_model, golden["prompt"][:1], sampler=sampler, cache=cache)
    np.testing.assert_array_equal(out.tokens, golden[f"fast_{name}"])
    assert out.nfe == golden[f"fast_{name}_nfe"]


def es_settings(golden, name):
    """The sampler of an ES-dLLM run, which reveals one token a step, and its other settings."""
    args = json.loads(str(golden[f"es_{name}_args"]))
    return Confidence(args["gen_length"], args["block_length"], steps=args["gen_length"]), args


@pytest.mark.parametrize(
    "name, mode, cache", [("2", "dual_cache", DualCache()), ("3", "no_cache", None)]
)
def test_the_baselines_of_es_dllm_give_the_same_tokens(golden, golden_model, name, mode, cache):
    sampler, args = es_settings(golden, name)
    assert args["mode"] == mode
    out = generate(golden_model, golden["prompt"], sampler=sampler, cache=cache)
    np.testing.assert_array_equal(out.tokens, golden[f"es_{name}"])


@pytest.fixture
def published_order(monkeypatch):
    """Breaks ties as PyTorch on a CPU does, and lets a sequence's window depend on its batch.

    ES-dLLM's scores tie often: near a block's end the second most confident token is one of many
    with none. And its window of a block's first step begins at the leftmost token that the last
    step revealed in any sequence. Both are accidents of the published code that we do not share.
    """

    def top(score, count):
        shape = jax.ShapeDtypeStruct((score.shape[0], count), jnp.int32)
        return jax.pure_callback(lambda x: torch_top(np.asarray(x), count), shape, score)

    def leftmost(revealed):
        return jnp.broadcast_to(jnp.min(jnp.argmax(revealed, axis=1)), (revealed.shape[0], 1))

    monkeypatch.setattr(importance, "top", top)
    monkeypatch.setattr(variants, "leftmost", leftmost)

    # programs of the patched code stay in this test
    for name in ("generate_program", "segment_program"):
        monkeypatch.setattr(generating, name, getattr(generating, name).traced_anew())


@pytest.mark.parametrize("name", ["0", "1"])
def test_es_dllm_gives_the_same_tokens(golden, golden_model, published_order, name):
    sampler, args = es_settings(golden, name)
    proportions, depths = np.array(args["proportion_steps"], float).T.tolist()
    cache = EarlySkip(
        tuple(proportions), tuple(depths), args["importance_score_alpha"],
        args["prompt_update_freq"], args["block_update_freq"],
    )  # fmt: skip
    out = generate(golden_model, golden["prompt"], sampler=sampler, cache=cache)
    np.testing.assert_array_equal(out.tokens, golden[f"es_{name}"])


# ------------------------------------------------------------------------- the order of PyTorch


def torch_top(scores, count):
    return np.array([introselect(score, count) for score in scores], np.int32)


def introselect(scores, count):
    """Indices of the `count` highest scores, in the order in which introselect leaves them.

    `torch.topk` on a CPU calls `std::nth_element`: median of three as the pivot, partition, go on
    with the part that holds the border, insertion sort for the last three.
    """
    order, score = list(range(len(scores))), scores.tolist()

    def swap(i, j):
        order[i], order[j] = order[j], order[i]

    def at(i):
        return score[order[i]]

    first, last = 0, len(order)
    for _ in range(2 * (len(order).bit_length() - 1) + 1):
        if last - first <= 3:
            break
        candidates = (first + 1, first + (last - first) // 2, last - 1)
        swap(first, median_of(candidates, at))
        cut = partition(first + 1, last, at(first), at, swap)
        first, last = (cut, last) if cut <= count - 1 else (first, cut)
    assert last - first <= 3, "the original would go over to a heap here"
    order[first:last] = sorted(order[first:last], key=lambda i: -score[i])  # stable, as insertion
    return order[:count]


def median_of(candidates, at):
    """The one in the middle, by the comparisons of the original: ties matter."""
    a, b, c = candidates
    if at(a) > at(b):
        return b if at(b) > at(c) else c if at(a) > at(c) else a
    return a if at(a) > at(c) else c if at(b) > at(c) else b


def partition(low, high, pivot, at, swap):
    """Higher scores to the front; equal ones change places, too. Returns the border."""
    while True:
        while at(low) > pivot:
            low += 1
        high -= 1
        while pivot > at(high):
            high -= 1
        if low >= high:
            return low
        swap(low, high)
        low += 1
