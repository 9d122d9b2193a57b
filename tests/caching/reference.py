"""Decoding with caches and policies, written for reading: NumPy, one row, one step at a time.

The tests compare rows of padded batches with it, so it knows neither batches nor padding, and it
has no kinds of model calls, no rounding and no programs: only what a step means. Float64.
"""

from __future__ import annotations

import jax
import numpy as np

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import NoCache, PrefixCache
from dials_jax.sampling.loop import step_limit
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed


class Decoder:
    """A model, and the canvas of one row with the keys and values of every layer.

    Row i of the model predicts token i, or token i + 1 in a shifted model: `offset` is 0 or 1.
    """

    def __init__(self, model, prompt, sampler, cache=None, policy=None, key=None):
        self.cfg, self.sampler, self.policy = model.config, sampler, policy
        self.cache = cache or NoCache()
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
        self.offset, self.start = int(self.cfg.shift), len(prompt)
        answer = [self.cfg.mask_id] * sampler.gen_length
        self.tokens = np.array([*prompt, *answer])
        size, cfg = len(self.tokens), self.cfg
        shape = (cfg.num_layers, size, cfg.num_kv_heads, cfg.head_dim)
        self.keys, self.values = np.zeros(shape), np.zeros(shape)
        self.seen = {}  # what ES-dLLM last saw of a layer, by (layer, row)
        self.confidence = np.zeros(size)  # of the token that a row last proposed
        self.last: list[int] = []  # the rows whose tokens the last step revealed
        self.gate_key = None if key is None else jax.random.split(key, 3)[1]

    # ------------------------------------------------------------------------------ decoding

    def decode(self):
        """Fills the canvas; returns the gates of every call, by (block, step in the block)."""
        gates, length = {}, self.sampler.block_length
        for block in range(self.sampler.num_blocks):
            first = self.start + block * length
            block_tokens, step = np.arange(first, first + length), 0
            while (self.tokens[block_tokens] == self.cfg.mask_id).any():
                gates[block, step] = self.step(block, step, block_tokens)
                step += 1
        return gates

    def step(self, block, step, block_tokens):
        places, leaving = self.window(block, step, block_tokens)
        places, h, gates = self.run(places, block, step, block_tokens if leaving else None)
        kept = np.isin(places + self.offset, block_tokens)
        places, logits = places[kept], self.head(h[kept])
        predicted = places + self.offset
        masked = self.tokens[predicted] == self.cfg.mask_id
        probability = softmax(logits).max(axis=-1)
        commit = masked & self.choose(np.where(masked, probability, -np.inf), step)
        self.confidence[places] = np.where(masked & ~commit, probability, 0.0)
        self.tokens[predicted[commit]] = logits[commit].argmax(axis=-1)
        self.last = list(places[commit])
        return gates

    def choose(self, confidence, step):
        rank = np.argsort(np.argsort(-confidence, kind="stable"))
        if self.sampler.threshold is not None:
            return (confidence >= self.sampler.threshold) | (rank == 0)
        steps = self.sampler.steps // self.sampler.num_blocks
        quota, more = divmod(self.sampler.block_length, steps)
        return rank < quota + (step < more)

    def window(self, block, step, block_tokens):
        """The rows that a call runs, and whether some of them leave on the way."""
        everything = np.arange(len(self.tokens))
        rows = block_tokens - self.offset  # those that predict the block
        first, end = rows[0], rows[-1] + 1
        if isinstance(self.cache, EarlySkip):
            place = block * len(rows) + step
            if place == 0:
                return everything, False
            if place % self.cache.prompt_every == 0:
                return everything[:end], False
            if step == 0:  # what was revealed last is not in the cache as what it is
                return everything[min(self.last) : end], False
            return rows, place % self.cache.block_every != 0
        if step == 0 or isinstance(self.cache, NoCache):
            return everything, False
        return (everything[first:] if isinstance(self.cache, PrefixCache) else rows), False

    # ---------------------------------------------------------------------------- the layers

    def run(self, places, block, step, block_tokens):
        """The rows left at the end, their hidden states and the gates.

        Args:
          block_tokens: of ES-dLLM's block, when rows leave; None: all stay.
        """
        h, gates = self.params["embed"]["table"][self.tokens[places]], []
        leave_at, num_layers = {}, self.cfg.num_layers
        if isinstance(self.cache, EarlySkip):
            pairs = list(zip(self.cache.depths, self.cache.proportions, strict=True))[1:]
            leave_at = {int(np.ceil(depth * num_layers)): share for depth, share in pairs}
        for layer in range(num_layers):
            gates.append(self.gate(layer, h, places, block, step))
            share = leave_at.get(layer) if block_tokens is not None else None
            inside = isinstance(self.cache, EarlySkip) and self.cache.indicator != "hidden"
            if gates[-1]:  # a layer that is skipped leaves its keys and values as they were
                h, places = self.layer(layer, h, places, share if inside else None, block_tokens)
            if not inside:
                kept = self.stay(layer, h, places, share, block_tokens)
                h, places = h[kept], places[kept]
        return places, h, np.array(gates)

    def stay(self, layer, now, places, share, block_tokens):
        """Which rows go on, all without a share; `now` is what they are judged by."""
        kept = np.arange(len(places))
        if share is not None:
            kept = self.important(layer, now, places, share, block_tokens)
        self.seen |= {(layer, place): x for place, x in zip(places[kept], now[kept], strict=True)}
        return kept

    def gate(self, layer, h, places, block, step):
        if self.policy is None:
            return True
        if isinstance(self.policy, Static):
            return layer not in self.policy.layers
        if not isinstance(self.cache, NoCache) and (block, step) == (0, 0):
            return True  # nobody has computed the keys that a later call would read
        if isinstance(self.policy, Random):
            number = block * step_limit(self.sampler, self.cache) + step  # names the draw
            key = jax.random.fold_in(self.gate_key, number)
            order = jax.random.permutation(key, self.cfg.num_layers)
            return bool(order[layer] >= self.policy.num_skipped)
        assert isinstance(self.policy, Routed)
        masked = self.tokens[places] == self.cfg.mask_id
        if not masked.any():
            return True
        router = jax.tree.map(lambda x: np.asarray(x[layer], np.float64), self.policy.router)
        x = silu(norm(h, router["norm"]["scale"], 1e-5) @ router["down"] + router["down_bias"])
        skip, execute = (x @ router["vote"] + router["vote_bias"])[masked].T
        return not (skip >= execute).mean() > self.policy.threshold

    def important(self, layer, now, places, share, block_tokens):
        """Which rows go on, the most important first: so ties go to the one before."""
        old, alpha = np.array([self.seen[layer, place] for place in places]), self.cache.alpha
        old, now = old.reshape(len(places), -1), now.reshape(len(places), -1)
        size = np.sqrt((old**2).mean(axis=-1)) + 1e-6
        change = np.abs(now - old).mean(axis=-1) / size
        score = alpha * self.confidence[places] + (1 - alpha) * change / max(1, change.max())
        if alpha > 0:
            score[np.argsort(-self.confidence[places], kind="stable")[:2]] += 2
        masked = block_tokens[self.tokens[block_tokens] == self.cfg.mask_id]
        score[places == masked[0] - self.offset] += 5
        if alpha < 1:
            score[np.isin(places, self.last)] += 3
        revealed = self.sampler.max_quota or len(self.last)
        count = max(int(share * len(block_tokens)), min(revealed + 2, len(block_tokens)))
        return np.argsort(-score, kind="stable")[:count]

    # -------------------------------------------------------------------------- the network

    def layer(self, layer, h, places, share, block_tokens):
        """One block on some places of the canvas, whose keys and values it brings up to date.

        Args:
          share: of the rows that go on, once their queries, keys and values are known.
        """
        cfg = self.cfg
        p = jax.tree.map(lambda x: x[layer], self.params["layers"])
        attention, mlp = p["attention"], p["mlp"]
        x = norm(h, p["attention_norm"]["scale"], cfg.norm_eps)
        q, k, v = (np.einsum("td,dnh->tnh", x, attention[name]) for name in "qkv")
        q, k = (rotate(x, places, cfg.rope_theta) for x in (q, k))
        if isinstance(self.cache, EarlySkip) and self.cache.indicator != "hidden":
            now = {"query": q, "key": k, "value": v}[self.cache.indicator]
            kept = self.stay(layer, now, places, share, block_tokens)
            h, q, k, v, places = (x[kept] for x in (h, q, k, v, places))
        self.keys[layer, places], self.values[layer, places] = k, v
        groups = cfg.num_heads // cfg.num_kv_heads
        keys, values = (x[layer].repeat(groups, axis=1) for x in (self.keys, self.values))
        scores = np.einsum("tnh,snh->nts", q, keys)
        y = np.einsum("nts,snh->tnh", softmax(scores / cfg.head_dim**0.5), values)
        h = h + np.einsum("tnh,nhd->td", y, attention["o"])
        x = norm(h, p["mlp_norm"]["scale"], cfg.norm_eps)
        return h + (silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"], places

    def head(self, h):
        scale, kernel = self.params["final_norm"]["scale"], self.params["head"]["kernel"]
        return norm(h, scale, self.cfg.norm_eps) @ kernel


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def rotate(x, places, theta):
    """Rotary embedding, half-split."""
    half = x.shape[-1] // 2
    angles = (places[:, None] * theta ** (-np.arange(half) / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
