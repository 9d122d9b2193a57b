"""What `benchmarks.invariance` computes of sequences, and how two results of them are compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import parse_policy
from benchmarks.random_model import make_routers
from dials_jax import sharding, trees
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import timed_jit
from dials_jax.config import ModelConfig
from dials_jax.evaluation.confidence_likelihood import confidence_scores
from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.modules import bind
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.infill import infill
from dials_jax.skipping.routed import SKIP, Routed, Router, router_shape

ALIGNED = 64  # tokens of extra padding: prompts stay aligned to the tiles of keys
SHORTER = 24  # tokens, or twice as many, that some texts are shorter: no multiple of a tile
SCORED = 8  # tokens of an answer that is scored by confidence
KINDS = ("pass", "likelihood", "generation", "infill", "confidence")
Run = Callable[["Sequences"], "Compared"]


class Sequences(NamedTuple):
    """What is computed: prompts, where they are real, and each one's key."""

    prompts: np.ndarray
    valid: np.ndarray | None
    keys: jax.Array

    def take(self, rows: np.ndarray) -> Sequences:
        return Sequences(
            self.prompts[rows], None if self.valid is None else self.valid[rows], self.keys[rows]
        )

    def padded(self) -> Sequences:
        """The same behind more padding."""
        valid = np.ones(self.prompts.shape, bool) if self.valid is None else self.valid
        wider = ((0, 0), (ALIGNED, 0))
        return Sequences(np.pad(self.prompts, wider), np.pad(valid, wider), self.keys)

    def texts(self) -> list[list[int]]:
        """Of three lengths, which are the sequences' own in every batch."""
        valid = np.ones(self.prompts.shape, bool) if self.valid is None else self.valid
        rows = [row[real] for row, real in zip(self.prompts, valid, strict=True)]
        most = [min(SHORTER, len(row) // 4) for row in rows]
        return [row[n * (row[0] % 3) :].tolist() for row, n in zip(rows, most, strict=True)]


def some_sequences(cfg: ModelConfig, count: int, length: int, seed: int = 0) -> Sequences:
    numbers = np.random.default_rng(seed)
    prompts = numbers.integers(2, min(1000, cfg.vocab_size // 2), (count, length))
    return Sequences(prompts, None, jax.random.split(seed_key(seed), count))


class Compared(NamedTuple):
    """Results of every sequence, as arrays that lead with it."""

    tokens: np.ndarray
    numbers: np.ndarray
    layers: np.ndarray | None = None  # [B, L], a fingerprint of every layer's output
    gates: np.ndarray | None = None  # [B, calls, L]

    def take(self, rows: Any) -> Compared:
        return jax.tree.map(lambda x: x[rows], self)

    def differences(self, other: Compared) -> dict[str, Any]:
        """How much of `other` is not bitwise this."""
        tokens, numbers = self.tokens != other.tokens, _bits(self.numbers) != _bits(other.numbers)
        some = _any(numbers) | _any(tokens)
        found = {
            "tokens": f"{tokens.sum()}/{tokens.size}",
            "numbers": f"{numbers.sum()}/{numbers.size}",
        }
        if self.layers is not None:
            at = np.flatnonzero((self.layers != other.layers).any(axis=0))
            found["layer"] = str(at[0] + 1) if at.size else "none"
        if self.gates is not None:
            gates = self.gates != other.gates
            some |= _any(gates)
            found |= {"gates": f"{gates.sum()}/{gates.size}", **self.divergence()}
        return {"sequences": f"{some.sum()}/{some.size}", "differ": int(some.sum()), **found}

    def divergence(self) -> dict[str, float]:
        """Shares: of the calls of layers, those that ran for some sequences and not for others; of
        the gates, those that were open."""
        apart = (self.gates != self.gates[:1]).any(axis=0)
        return {"diverged": float(apart.mean()), "open": float(self.gates.mean())}


def _any(differs: np.ndarray) -> np.ndarray:
    return differs.any(axis=tuple(range(1, differs.ndim)))


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.int32) if x.dtype == np.float32 else x


# ----------------------------------------------------------------------------- what is computed


def generated(
    model: Model, some: Sequences, policy: Policy | None, *, gen: int, block: int, cache: str,
    temperature: float,
) -> Compared:  # fmt: skip
    sampler = Confidence(gen_length=gen, block_length=block, steps=gen, temperature=temperature)
    out = generate(
        model, some.prompts, some.valid, key=some.keys, sampler=sampler, log_probs=True,
        policy=policy, cache=parse_cache(cache),
    )  # fmt: skip
    gates = None if policy is None else np.moveaxis(out.gates, 2, 0)
    return Compared(np.asarray(out.tokens)[:, -gen:], np.asarray(out.log_probs), gates=gates)


def one_pass(model: Model, some: Sequences, policy: Policy | None, *, gen: int) -> Compared:
    """Logits of the masked positions, and fingerprints of the layers' outputs there."""
    cfg, wide = model.config, ((0, 0), (0, gen))
    tokens = np.pad(some.prompts, wide, constant_values=cfg.mask_id)
    valid = None if some.valid is None else np.pad(some.valid, wide, constant_values=True)
    batch = model.place_sequences((tokens.astype(np.int32), valid, some.keys))
    out, _ = model.run(layers_program, *batch, policy, num_last=gen)
    best, chosen, layers, gates = map(np.asarray, out)
    layers, gates = np.moveaxis(layers, 1, 0), np.moveaxis(gates, 1, 0)[:, None]
    found = Compared(best, chosen, layers, None if policy is None else gates)
    return found.take(slice(len(tokens)))


@timed_jit("cfg", "num_last")
def layers_program(params, tokens, valid, keys, policy, *, cfg, num_last):
    """The best token and all logits (of every 97th token: a sample) at the last positions; of
    every layer's output the sum of its bits, which is exact; and the gates."""

    def observe(h, new):
        last = new[:, -num_last:]
        bits = jax.lax.bitcast_convert_type(last, f"uint{8 * last.dtype.itemsize}")
        weights = jnp.arange(bits[0].size, dtype=jnp.uint32).reshape(bits[0].shape) + 1
        return jnp.sum(bits.astype(jnp.uint32) * weights, axis=(1, 2))

    out = transformer.run_layers(
        cfg, params, tokens, valid, policy, sequence_keys=keys, observe=observe
    )
    h = transformer.shift_to_predicted(cfg, out.h, valid)[:, -num_last:]
    logits = transformer.head_logits(cfg, params, h)
    return jnp.argmax(logits, axis=-1), logits[..., ::97], out.observed, out.gates


def likelihoods(model: Model, some: Sequences, policy: Policy | None) -> Compared:
    """Of the second half of texts of several lengths, padded to the longest of a batch."""
    texts = some.texts()
    length = 0 if some.valid is None else some.prompts.shape[1]
    pairs = pad_pairs([(x[: len(x) // 2], x[len(x) // 2 :]) for x in texts], model.config, length)
    scores, _ = score_pairs(
        model, pairs, some.keys, np.zeros(len(texts), int), stratum=1, policy=policy
    )
    values = np.asarray(scores.log_likelihood, np.float32)[:, None]
    return Compared(np.asarray(scores.is_greedy)[:, None], values)


def by_confidence(model: Model, some: Sequences, policy: Policy | None) -> Compared:
    pairs = [(x[:-SCORED], x[-SCORED:]) for x in some.texts()]
    scores = confidence_scores(model, pairs, policy=policy, key=some.keys)
    return Compared(scores.order.T, np.asarray(scores.log_likelihood, np.float32)[:, None])


def infilled(model: Model, some: Sequences, policy: Policy | None, *, gen: int) -> Compared:
    """Every second token of the end of texts of several lengths."""
    mask_id = model.config.mask_id
    end = min(gen, min(map(len, some.texts())) // 2)
    places = range(-end + 1, 0, 2)
    texts = [np.asarray(text) for text in some.texts()]
    for text in texts:
        text[places] = mask_id
    out = infill(model, [x.tolist() for x in texts], key=some.keys, policy=policy, log_probs=True)
    return Compared(out.tokens[:, places], out.log_probs[:, places])


# -------------------------------------------------------------------------------------- cases


def divergent(model: Model, options: argparse.Namespace) -> Routed:
    """Routers that disagree: at every layer but the first about half of the tokens vote to skip it,
    and which half differs most between sequences.

    A vote is a token's place along a direction in which the sequences' means of the router's
    features differ, against the median of all tokens.
    """
    plain = Model(model.config, model.params, model.mesh)
    some = some_sequences(model.config, max(options.sizes), options.prompt)
    routed = make_routers(plain)
    stacked = not trees.is_unrolled(routed.router)
    layers = list(trees.unstack(routed.router) if stacked else routed.router)

    def policy() -> Routed:
        router = trees.stack(tuple(layers)) if stacked else tuple(layers)
        return Routed(jax.device_put(router, sharding.replicated(model.mesh)), 0.5)

    for i, layer in list(enumerate(layers))[1:]:  # at the first layer all masks are equal
        h = layer_inputs(plain, some, policy(), gen=options.gen)[i]
        router = bind(Router, layer, model.config.d_model, router_shape(layer))
        with plain.context():
            x = np.asarray(router.hidden(h))
        means = x.mean(axis=1)
        *_, directions = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)
        direction = directions[i % max(1, len(means) - 1)]
        margin = np.median(x @ direction)
        layers[i] = layer | {
            "vote": jnp.zeros((x.shape[-1], 2)).at[:, SKIP].set(direction),
            "vote_bias": jnp.zeros(2).at[SKIP].set(-margin),
        }
    return policy()


def layer_inputs(model: Model, some: Sequences, policy: Policy, *, gen: int) -> jax.Array:
    """[L, B, gen, D]: what the layers get at the masked positions of the first call."""
    wide = ((0, 0), (0, gen))
    tokens = np.pad(some.prompts, wide, constant_values=model.config.mask_id).astype(np.int32)
    out, _ = model.run(inputs_program, *model.place_sequences((tokens, some.keys)), policy, gen=gen)
    return out


@timed_jit("cfg", "gen")
def inputs_program(params, tokens, keys, policy, *, cfg, gen):
    return transformer.run_layers(
        cfg, params, tokens, None, policy, sequence_keys=keys, executor="select",
        observe=lambda h, new: h[:, -gen:],
    ).observed  # fmt: skip


def policies_of(
    text: str, models: Sequence[Model], options: argparse.Namespace
) -> list[Policy | None]:
    """The same policy for each of the models, on its own devices."""
    if text == "routed":
        routed = divergent(models[0], options)
        return [jax.device_put(routed, sharding.replicated(model.mesh)) for model in models]
    return [parse_policy(text, x.num_layers, partial(make_routers, x)) for x in models]


def cases(models: Sequence[Model], options: argparse.Namespace) -> Iterator[tuple[str, list[Run]]]:
    """What is computed of the sequences, by name, with each of the models."""
    for text in options.policies:
        policies = policies_of(text, models, options)
        for name, run in ways_to_run(text, options):
            pairs = zip(models, policies, strict=True)
            yield name, [partial(run, model, policy=policy) for model, policy in pairs]


def ways_to_run(
    policy: str, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[..., Compared]]]:
    one_each = {
        "pass": ("one pass", partial(one_pass, gen=options.gen)),
        "likelihood": ("likelihood", likelihoods),
        "infill": ("infill", partial(infilled, gen=options.gen)),
        "confidence": ("by confidence", by_confidence),
    }
    for kind in options.what:
        if kind in one_each:
            name, run = one_each[kind]
            yield f"{name}, {policy}", run
            continue
        for cache in options.caches:
            for temperature in options.temperatures:
                run = partial(
                    generated, gen=options.gen, block=options.block, cache=cache,
                    temperature=temperature,
                )  # fmt: skip
                yield f"{cache}, {policy}, temperature {temperature:g}", run
