"""Decoding with a cache and a policy, written for reading: one sequence, one step at a time.

Read this first. It states in NumPy what a step means: which positions a cache runs, which layers a
policy skips, which tokens ES-dLLM skips and which the sampler reveals. It has no batches, padding,
compiled programs or rounding (float64), and nothing in the library uses it. The
tests compare each sequence of a padded batch with it, token for token and gate for gate
(`tests/caching/test_compositions.py`; in 8 bits `tests/eight_bits`).
"""

from __future__ import annotations

from functools import partial

import jax
import ml_dtypes
import numpy as np

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import NoCache, PrefixCache
from dials_jax.nn.eight_bits import dequantise_modules
from dials_jax.sampling.loop import step_limit
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.routed import Routed


class Decoder:
    """A model, the canvas of one sequence, and the keys and values of every layer.

    The model's output at position i predicts token i, or token i + 1 in a shifted model (Dream):
    `shift` is 0 or 1. A position below is where the model runs, unless it is called a token's.
    """

    def __init__(self, model, prompt, sampler, cache=None, policy=None, key=None):
        self.cfg, self.sampler, self.policy = model.config, sampler, policy
        self.cache = cache or NoCache()
        self.weights, params = model.weights, model.params
        if self.weights:  # as the numbers that they stand for
            plain = partial(dequantise_modules, dtype=np.float32)
            params = {**params, **plain({"head": params["head"]})}
            params["layers"] = jax.vmap(plain)(params["layers"])
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.shift, self.prompt_length = int(self.cfg.right_shift), len(prompt)
        answer = [self.cfg.mask_id] * sampler.gen_length
        self.tokens = np.array([*prompt, *answer])
        length, cfg = len(self.tokens), self.cfg
        shape = (cfg.num_layers, length, cfg.num_kv_heads, cfg.head_dim)
        self.keys, self.values = np.zeros(shape), np.zeros(shape)
        self.seen = {}  # ES-dLLM's indicator as it was last computed, by (layer, position)
        self.confidence = np.zeros(length)  # of the token last proposed from a position
        self.revealed = []  # the positions from which the last step wrote tokens
        self.gate_key = None if key is None else jax.random.split(key, 3)[1]

    # ------------------------------------------------------------------- blocks, steps, tokens

    def decode(self):
        """Fills the canvas; returns the gates of every call, by (block, step in the block)."""
        gates, length = {}, self.sampler.block_length
        for block in range(self.sampler.num_blocks):
            first = self.prompt_length + block * length
            block_tokens, step = np.arange(first, first + length), 0
            full, edits_left = False, self.sampler.full_steps
            while not full or edits_left:
                gates[block, step] = self.step(block, step, block_tokens)
                if full:  # a step that changes nothing is the last
                    edits_left = edits_left - 1 if self.revealed else 0
                full = not (self.tokens[block_tokens] == self.cfg.mask_id).any()
                step += 1
        return gates

    def step(self, block, step, block_tokens):
        """Runs the model once, reveals tokens of the block and edits others; returns the gates."""
        positions, skips_tokens = self.window(block, step, block_tokens)
        positions, h, gates = self.run_layers(
            positions, block, step, block_tokens if skips_tokens else None
        )
        in_block = np.isin(positions + self.shift, block_tokens)
        positions, logits = positions[in_block], self.head(h[in_block])
        predicted = positions + self.shift
        masked = self.tokens[predicted] == self.cfg.mask_id
        p, proposed = softmax(logits), logits.argmax(axis=-1)
        probability = p.max(axis=-1)
        confidence = (p * np.log(p)).sum(axis=-1) if self.sampler.orders_by_entropy else probability
        commit = masked & self.choose(np.where(masked, confidence, -np.inf), step)
        self.confidence[positions] = np.where(masked & ~commit, probability, 0.0)
        if self.sampler.edits:
            other = ~masked & (proposed != self.tokens[predicted]) & (proposed != self.cfg.mask_id)
            commit |= other & (probability > self.sampler.edit_threshold)
        self.tokens[predicted[commit]] = proposed[commit]
        self.revealed = list(positions[commit])
        return gates

    def choose(self, confidence, step):
        """The tokens to reveal: all that a rule is sure of, or a quota of the most confident."""
        order = np.argsort(-confidence, kind="stable")
        rank = np.argsort(order)
        if self.sampler.threshold is not None:
            return (confidence >= self.sampler.threshold) | (rank == 0)
        if self.sampler.entropy_threshold is not None:
            return (-confidence <= self.sampler.entropy_threshold) | (rank == 0)
        if self.sampler.entropy_bound is not None:  # of those that are more certain
            before = np.append(0.0, np.cumsum(-confidence[order])[:-1])
            return (before <= self.sampler.entropy_bound)[rank]
        steps = self.sampler.steps // self.sampler.num_blocks
        quota, more = divmod(self.sampler.block_length, steps)
        return rank < quota + (step < more)

    # ------------------------------------------------------------------ caches: what a step runs

    def window(self, block, step, block_tokens):
        """The positions that a step runs, and whether tokens are skipped on the way."""
        everything = np.arange(len(self.tokens))
        block_positions = block_tokens - self.shift
        first, end = block_positions[0], block_positions[-1] + 1
        if isinstance(self.cache, EarlySkip):
            count = block * len(block_positions) + step
            if count == 0:
                return everything, False
            if count % self.cache.prompt_every == 0:
                return everything[:end], False
            if step == 0:  # the tokens revealed last are in the cache as masks
                return everything[min(self.revealed) : end], False
            return block_positions, count % self.cache.block_every != 0
        if step == 0 or isinstance(self.cache, NoCache):
            return everything, False
        if isinstance(self.cache, PrefixCache):
            return everything[first:], False
        return block_positions, False

    def run_layers(self, positions, block, step, block_tokens):
        """The positions that are left at the end, their hidden states, and the gates.

        Args:
          block_tokens: if ES-dLLM skips tokens, the block they belong to; None: all are kept.
        """
        h, gates = self.params["embed"]["table"][self.tokens[positions]], []
        proportions, num_layers = {}, self.cfg.num_layers
        if isinstance(self.cache, EarlySkip):
            pairs = list(zip(self.cache.depths, self.cache.proportions, strict=True))[1:]
            proportions = {int(np.ceil(depth * num_layers)): share for depth, share in pairs}
        inside = isinstance(self.cache, EarlySkip) and self.cache.indicator != "hidden"
        for layer in range(num_layers):
            gates.append(self.gate(layer, h, positions, block, step))
            proportion = proportions.get(layer) if block_tokens is not None else None
            if gates[-1]:  # a layer that is skipped leaves its keys and values as they were
                within = proportion if inside else None
                h, positions = self.layer(layer, h, positions, within, block_tokens)
            if not inside:
                kept = self.keep(layer, h, positions, proportion, block_tokens)
                h, positions = h[kept], positions[kept]
        return positions, h, np.array(gates)

    # ------------------------------------------------------------------ policies: layer skipping

    def gate(self, layer, h, positions, block, step):
        """Whether the layer runs."""
        if self.policy is None:
            return True
        if isinstance(self.policy, Static):
            return layer not in self.policy.layers
        if not isinstance(self.cache, NoCache) and (block, step) == (0, 0):
            return True  # a later call would read keys that were never computed
        if isinstance(self.policy, Random):
            number = block * step_limit(self.sampler, self.cache) + step  # names the draw
            key = jax.random.fold_in(self.gate_key, number)
            order = jax.random.permutation(key, self.cfg.num_layers)
            return bool(order[layer] >= self.policy.num_skipped)
        assert isinstance(self.policy, Routed)
        masked = self.tokens[positions] == self.cfg.mask_id
        if not masked.any():
            return True
        router = jax.tree.map(lambda x: np.asarray(x[layer], np.float64), self.policy.router)
        x = silu(norm(h, router["norm"]["scale"], 1e-5) @ router["down"] + router["down_bias"])
        for kernel, bias in zip(router.get("inner", ()), router.get("inner_bias", ()), strict=True):
            x = silu(x @ kernel + bias)
        skip, execute = (x @ router["vote"] + router["vote_bias"])[masked].T
        soft = self.policy.votes == "soft"
        votes = 1 / (1 + np.exp(execute - skip)) if soft else skip >= execute
        threshold = np.broadcast_to(self.policy.threshold, self.cfg.num_layers)[layer]
        return not votes.mean() > threshold

    # ------------------------------------------------------------------- ES-dLLM: token skipping

    def keep(self, layer, indicator, positions, proportion, block_tokens):
        """The positions that are kept; stores their indicator."""
        kept = np.arange(len(positions))
        if proportion is not None:
            kept = self.most_important(layer, indicator, positions, proportion, block_tokens)
        for position, x in zip(positions[kept], indicator[kept], strict=True):
            self.seen[layer, position] = x
        return kept

    def most_important(self, layer, indicator, positions, proportion, block_tokens):
        """The indices in `positions` of those that are kept, the most important first."""
        score = self.importance(layer, indicator, positions, block_tokens)
        count = self.num_kept(proportion, len(block_tokens))
        return np.argsort(-score, kind="stable")[:count]

    def num_kept(self, proportion, block_length):
        """A proportion of the block, or two more than a step reveals (a quota: at most)."""
        num_revealed = self.sampler.max_quota or len(self.revealed)
        return max(int(proportion * block_length), min(num_revealed + 2, block_length))

    def importance(self, layer, indicator, positions, block_tokens):
        """Confidence, change and the fixed bonus; ties go to the first."""
        alpha, confidence = self.cache.alpha, self.confidence[positions]
        old = np.array([self.seen[layer, position] for position in positions])
        old, new = (x.reshape(len(positions), -1) for x in (old, indicator))
        change = np.abs(new - old).mean(axis=-1) / (np.sqrt((old**2).mean(axis=-1)) + 1e-6)
        score = alpha * confidence + (1 - alpha) * change / max(1, change.max())
        if alpha > 0:
            score[np.argsort(-confidence, kind="stable")[:2]] += 2
        masked = block_tokens[self.tokens[block_tokens] == self.cfg.mask_id]
        score[positions == masked[0] - self.shift] += 5
        if alpha < 1:
            score[np.isin(positions, self.revealed)] += 3
        return score

    # ------------------------------------------------------------------------------- the network

    def layer(self, layer, h, positions, proportion, block_tokens):
        """One block at some positions, whose keys and values it refreshes.

        Args:
          proportion: of tokens that are kept once queries, keys and values are known; None: all.
        """
        cfg = self.cfg
        p = jax.tree.map(lambda x: x[layer], self.params["layers"])
        attention, mlp = p["attention"], p["mlp"]
        x = self.rounded(norm(h, p["attention_norm"]["scale"], cfg.norm_eps))
        q, k, v = (np.einsum("td,dnh->tnh", x, attention[name]) for name in "qkv")
        if cfg.qkv_bias:
            q, k, v = (
                x + attention[f"{name}_bias"] for name, x in zip("qkv", (q, k, v), strict=True)
            )
        q, k = (rotate(x, positions, cfg.rope_theta) for x in (q, k))
        if isinstance(self.cache, EarlySkip) and self.cache.indicator != "hidden":
            indicator = {"query": q, "key": k, "value": v}[self.cache.indicator]
            kept = self.keep(layer, indicator, positions, proportion, block_tokens)
            h, q, k, v, positions = (x[kept] for x in (h, q, k, v, positions))
        self.keys[layer, positions], self.values[layer, positions] = k, v
        groups = cfg.num_heads // cfg.num_kv_heads
        keys, values = (x[layer].repeat(groups, axis=1) for x in (self.keys, self.values))
        scores = np.einsum("tnh,snh->nts", q, keys)
        y = np.einsum("nts,snh->tnh", softmax(scores / cfg.head_dim**0.5), values)
        h = h + np.einsum("tnh,nhd->td", self.rounded(y), attention["o"])
        x = self.rounded(norm(h, p["mlp_norm"]["scale"], cfg.norm_eps))
        return h + self.rounded(silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"], positions

    def rounded(self, x):
        """What a matmul multiplies with weights in 8 bits: every token by a scale of its own."""
        if self.weights is None:
            return x
        axes = tuple(range(1, x.ndim))
        scale = np.maximum(np.abs(x).max(axis=axes, keepdims=True), 1e-30)
        if self.weights == "int8":
            return np.rint(x / scale * 127) * scale / 127
        return (x / scale * 448).astype(ml_dtypes.float8_e4m3fn).astype(x.dtype) * scale / 448

    def head(self, h):
        """Logits."""
        scale, kernel = self.params["final_norm"]["scale"], self.params["head"]["kernel"]
        return self.rounded(norm(h, scale, self.cfg.norm_eps)) @ kernel


def norm(x, scale, eps):
    """RMS norm."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def rotate(x, positions, theta):
    """Rotary embedding, half-split."""
    half = x.shape[-1] // 2
    angles = (positions[:, None] * theta ** (-np.arange(half) / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
