"""Every policy x cache x sampler, on golden checkpoints of LLaDA and Dream, in int8 and in e4m3.

What exists is read from the library: its classes, and the fields and choices of its settings. A
class, a field or a choice that no composition has fails a test.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import random
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

import dials_jax as dj
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.config import EightBits
from dials_jax.errors import InputError
from dials_jax.skipping.policies import StaticGates
from tests.caching.cases import keys_of
from tests.conftest import random_routers
from tests.eight_bits.followed import follow

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("llada_tiny", "dream_tiny")
KINDS = get_args(EightBits)

G, B = 16, 8
SURE = {"gen_length": G, "block_length": B, "threshold": 0.3}
SAMPLERS = {
    "one a step": dj.Confidence(G, B, confidence_eos_eot_inf=True),
    "quota": dj.Confidence(G, B, steps=4, logits_eos_inf=True),
    "threshold": dj.Confidence(**SURE, stop_at_eos=True),
    "factor": dj.Confidence(G, B, factor=2.2, delay_eos=True),
    "entropy": dj.Confidence(G, B, entropy_threshold=2.5, stop_ids=(7, 11)),
    "bound": dj.Confidence(G, B, entropy_bound=4.0),
    "edit": dj.Confidence(**SURE, edit_threshold=0.3, max_edit_steps=3),
    "random": dj.Confidence(G, B, steps=8, temperature=0.7, remasking="random"),
    "guided": dj.Confidence(G, B, steps=8, cfg_scale=0.5),
    "appended": dj.Confidence(
        **SURE, append_blocks=True, end_think_ids=(5, 6), end_think_boost=9.0, end_think_power=1.5
    ),
    "origin": dj.Dream(G, steps=8, alg="origin", temperature=0.5, top_p=0.9),
    "maskgit_plus": dj.Dream(G, steps=8, alg="maskgit_plus", top_k=5),
    "topk_margin": dj.Dream(G, steps=8, alg="topk_margin", alg_temp=0.3),
    "dream's entropy": dj.Dream(G, eps=0.01),
    "ancestral": dj.Ancestral(G, steps=8, slots=16),
    "as published": dj.Ancestral(G, steps=8, precision="float32"),
    "first hitting": dj.Ancestral(G, steps=G, first_hitting=True),
    "autoregressive": dj.Autoregressive(G, temperature=0.5),
    "block diffusion": dj.BlockDiffusion(G, B),
}
ES = {"prompt_every": 12, "block_every": 4}
RARELY = {"prompt_every": 24, "block_every": 8}
CACHES = {
    "none": None,
    "prefix": dj.PrefixCache(),
    "dual": dj.DualCache(),
    "hidden": EarlySkip((1.0, 0.5), (0.0, 0.3), **ES),
    "query": EarlySkip((1.0, 0.75), (0.0, 0.3), 0.9, **RARELY, indicator="query"),
    "key": EarlySkip((1.0, 0.5), (0.0, 0.3), 0.1, **ES, indicator="key"),
    "value": EarlySkip((1.0, 0.75), (0.0, 0.3), 0.3, **RARELY, indicator="value"),
}


def policies_of(cfg):
    router = random_routers(cfg, seed=3)  # about half of the layers run, others in each sequence
    thresholds = np.linspace(0.45, 0.55, cfg.num_layers)
    return {
        "full": None,
        "static": dj.Static((1, cfg.num_layers - 2)),
        "static gates": StaticGates.of((2,), cfg.num_layers),
        "random": dj.Random(2),
        "routed": dj.Routed(router, 0.5),
        "soft": dj.Routed(router, thresholds, votes="soft"),
    }


POLICIES = ("full", "static", "static gates", "random", "routed", "soft")


class Composition(NamedTuple):
    model: str
    weights: str
    policy: str
    cache: str
    sampler: str


def compositions(models=MODELS, kinds=None):
    """All of them, what is refused included, in an order drawn at random.

    Args:
      kinds: each is run in all of these; None: in one, which is another on the next model.
    """
    found = []
    for policy, cache, (i, sampler) in product(POLICIES, CACHES, enumerate(SAMPLERS)):
        for j, model in enumerate(models):
            chosen = kinds or (KINDS[(i + j) % len(KINDS)],)
            found += [Composition(model, kind, policy, cache, sampler) for kind in chosen]
    random.Random(0).shuffle(found)
    return found


REFUSALS = (  # the first that holds is the one that a user reads
    (lambda c, s, p: isinstance(s, dj.Autoregressive), "Autoregressive is for causal models"),
    (lambda c, s, p: isinstance(s, dj.BlockDiffusion), "BlockDiffusion generates by block-causal"),
    (lambda c, s, p: c and isinstance(s, dj.Ancestral), "nothing can be kept between its steps"),
    (lambda c, s, p: skips(c) and not s.is_probability, "EarlySkip weighs confidence"),
    (lambda c, s, p: skips(c) and s.edits, "EarlySkip leaves revealed tokens out"),
    (lambda c, s, p: skips(c) and s.append_blocks, "EarlySkip computes the whole canvas first"),
    (lambda c, s, p: skips(c) and s.cfg_scale > 0, "EarlySkip does not compose with guidance"),
    (lambda c, s, p: skips(c) and c.indicator != "hidden" and p, "reads a layer that a policy may"),
)  # fmt: skip


def skips(cache):
    return isinstance(cache, EarlySkip)


def refusal(composition):
    """What the error of a composition says; None: it is none that the library refuses."""
    cache, sampler = CACHES[composition.cache], SAMPLERS[composition.sampler]
    policy = composition.policy != "full"
    return next((text for holds, text in REFUSALS if holds(cache, sampler, policy)), None)


# ------------------------------------------------------------------------------------- running them


@functools.cache
def loaded(model, weights):
    return dj.load(GOLDEN / model, weights=weights)


@functools.cache
def named_policies(model):
    return policies_of(loaded(model, KINDS[0]).config)


def prompts():
    """Three sequences, padded on the left by 0, 1 and 3."""
    tokens = np.random.default_rng(0).integers(2, 290, (3, 5))
    return tokens, np.arange(5) >= np.array([0, 1, 3])[:, None]


def run(composition, executor):
    """A generation, and what comes of comparing it with the plain decoder."""
    model, key = loaded(composition.model, composition.weights), keys_of(3)
    settings = {
        "sampler": SAMPLERS[composition.sampler],
        "cache": CACHES[composition.cache],
        "policy": named_policies(composition.model)[composition.policy],
    }
    out = dj.generate(model, *prompts(), **settings, key=key, executor=executor, trajectory=True)
    compared = follow(out, model, prompts(), key, **settings)
    return out, compared


def check(composition, executor="select"):
    """Runs a composition. Returns: what was compared; None: it is refused, as it should be.

    Raises: AssertionError for anything else.
    """
    expected = refusal(composition)
    if expected is None:
        out, compared = run(composition, executor)
        check_errors(compared, composition.weights)
        if composition.policy in ("random", "routed", "soft"):  # or nobody would see them decide
            assert 0.2 < out.gates.mean() < 0.95 and (out.gates != out.gates[..., :1]).any()
        return compared
    try:
        run(composition, executor)
    except InputError as error:
        assert expected in str(error) and "\n" not in str(error), error
        return None
    raise AssertionError(f"not refused: {expected}")


# Nats. The plain decoder moves by as much if what it rounds is moved by 1e-6.
MEDIAN, LARGEST = {"int8": 0.02, "fp8": 0.06}, {"int8": 1.0, "fp8": 1.5}


def check_errors(compared, kind):
    """Most log-probabilities are the plain ones up to float32, and some are behind a rounding that
    fell to the other side. (If only the weights were rounded, half would be off by 0.08 in int8, by
    0.3 in e4m3.)
    """
    errors = np.array(compared.errors)
    assert len(errors) and np.isfinite(errors).all()
    assert np.median(errors) < MEDIAN[kind], f"median error {np.median(errors):.2g} nats"
    assert np.max(errors) < LARGEST[kind], f"largest error {np.max(errors):.2g} nats"
    ties = compared.near_ties, compared.decisions
    assert ties[0] <= 0.02 * ties[1], f"{ties[0]} of {ties[1]} decisions are near-ties"


# ----------------------------------------------------------------------------- what the library has


def classes_of(package, *members):
    """The classes in the modules of a package that have all of these members."""
    found = set()
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        found |= {
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if cls.__module__ == module.__name__
            and dataclasses.is_dataclass(cls)
            and all(hasattr(cls, name) for name in members)
        }
    return found
