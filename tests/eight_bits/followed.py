"""A generation in 8 bits, followed call by call by the plain decoder (`dials_jax/reference.py`).

    the library    canvas --call--> gates, tokens kept, tokens revealed --> canvas --call--> ...
                     |                   |  compared                          |
    plain decoder  canvas --call--> gates, tokens kept, tokens revealed     canvas --call--> ...

The network, the caches, the policies and ES-dLLM's choice are those of the plain decoder, in
float64. What a sampler makes of logits is the library's own rule: it knows nothing of 8 bits, and
other tests compare it with the published codes.

Rounding to 8 bits is a step: where float32 and float64 lie on two sides of one, a number differs by
a 127th of the largest, or by an eighth of itself, and a close decision may turn out differently. So
the decoder goes on from what the library decided, and a decision may differ only where noise of
`NOISE` of the spread of what it is made from turns it into the library's: a near-tie. These are
counted, and the log-probabilities of all tokens that are written are compared.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.reference import Decoder
from dials_jax.sampling.ancestral import Ancestral, PublishedSteps, draw_tokens, token_keys
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.end_of_thinking import boost_end_of_thinking
from dials_jax.sampling.loop import step_limit
from dials_jax.sampling.reveal import StepInfo, position_keys
from dials_jax.skipping.policies import Static, StaticGates

# Of a spread. In e4m3 an error of 1e-6, put on what is rounded, moves logits by up to 0.3 of it.
NOISE, DRAWS = {"int8": 0.05, "fp8": 0.15}, 256


def follow(out, model, prompts, key, *, sampler, cache, policy):
    """Compares a generation, made with `trajectory=True`, sequence by sequence.

    Returns: `Compared`. Raises: AssertionError for a decision that differs and is no near-tie.
    """
    (tokens, valid), compared = prompts, Compared()
    for i in range(len(tokens)):
        prompt = tokens[i, valid[i]]
        Sequence(out, i, model, prompt, sampler, cache, policy, key[i], compared).follow()
    return compared


@dataclass
class Compared:
    """What was compared: decisions, and the errors of log-probabilities in nats."""

    decisions: int = 0
    near_ties: int = 0
    errors: list[float] = field(default_factory=list)

    def decision(self, what, plain, library, shaken):
        """Compares the decisions of an array. Args: shaken: () -> the plain ones, under noise."""
        differ = np.asarray(plain != library)
        self.decisions += differ.size
        if differ.any():
            close = (shaken() == library).any(axis=0)
            assert close[differ].all(), f"{what}: plain {plain}, library {library}"
            self.near_ties += int(differ.sum())


def shake(x, weights):
    """x [..., n] `DRAWS` times, with noise of `NOISE` of its spread along the last axis, in some
    rows more and in others less: a rounding that falls to the other side is that of one token."""
    rng = np.random.default_rng(0)
    size = NOISE[weights] * x.std(axis=-1, keepdims=True)
    size = size * rng.normal(size=(DRAWS, *x.shape[:-1], 1))
    return x + size * rng.normal(size=(DRAWS, *x.shape))


class Network(Decoder):
    """The plain decoder's layers, going on from the library's gates and from the tokens it kept.

    Attributes:
      gates: [calls, L], the library's.
      depth: [calls, T], the library's: see `Trajectory`.
      spread: [T], of the confidences, under noise.
    """

    def __init__(self, compared, gates, depth, gate_key, *settings):
        super().__init__(*settings)
        self.compared, self.gates, self.depth = compared, gates, depth
        self.gate_key, self.call = gate_key, 0
        self.spread = np.zeros(len(self.tokens))

    def at(self, call, canvas):
        """Before a call. Appended blocks make the canvas longer."""
        new = max(len(canvas) - self.keys.shape[1], 0)
        self.keys, self.values = (
            np.pad(x, [(0, 0), (0, new), (0, 0), (0, 0)])[:, : len(canvas)]
            for x in (self.keys, self.values)
        )
        self.call, self.tokens = call, canvas

    def gate(self, layer, h, positions, block, step):
        stores = not isinstance(self.cache, NoCache)
        if stores and step == 0 and getattr(self.sampler, "append_blocks", False):
            block = 0  # nothing of this block is stored, as in a generation's first call

        def plain(h):
            return Decoder.gate(self, layer, h, positions, block, step)

        def shaken():
            return np.array([plain(x) for x in shake(h, self.weights)])

        library = self.gates[self.call, layer]
        what = f"call {self.call}, gate of layer {layer}"
        self.compared.decision(what, plain(h), library, shaken)
        return library

    def most_important(self, layer, indicator, positions, proportion, block_tokens):
        known = self.confidence

        def plain(indicator, confidence=known):
            self.confidence = confidence
            kept = super(Network, self).most_important(
                layer, indicator, positions, proportion, block_tokens
            )
            self.confidence = known
            return np.isin(np.arange(len(positions)), kept)

        def shaken():
            noise = np.random.default_rng(1).normal(size=(DRAWS, len(known)))
            both = shake(indicator, self.weights), known + self.spread * noise
            return np.array([plain(*x) for x in zip(*both, strict=True)])

        left_after = layer + (self.cache.indicator == "hidden")
        library, mine = self.depth[self.call, positions] > left_after, plain(indicator)
        assert mine.sum() == library.sum()
        what = f"call {self.call}, tokens kept at layer {layer}"
        self.compared.decision(what, mine, library, shaken)
        score = self.importance(layer, indicator, positions, block_tokens)
        order = np.argsort(-score, kind="stable")
        return order[library[order]]


class Sequence:
    """One sequence of a batch.

    Args:
      number: in the batch.
      prompt: without padding.
      key: of the sequence.
    """

    def __init__(self, out, number, model, prompt, sampler, cache, policy, key, compared):
        pad = out.tokens.shape[1] - sampler.gen_length - len(prompt)
        self.sampler, self.cfg, self.compared = sampler, model.config, compared
        self.steps, self.own, self.start = out.steps, out.own[:, number], len(prompt)
        tokens, log_probs, depth = (x[:, number, pad:] for x in out.trajectory[:3])
        self.canvases, self.log_probs = tokens, log_probs
        self.noise_key, *gate_keys = jax.random.split(key, 3)
        self.is_ancestral = isinstance(sampler, Ancestral)
        self.appends = getattr(sampler, "append_blocks", False)
        self.layout = Confidence(sampler.gen_length) if self.is_ancestral else sampler
        self.block_length = self.layout.block_length
        self.limit = step_limit(self.layout, cache or NoCache())
        if self.appends and isinstance(cache, PrefixCache):
            cache = DualCache()  # they are the same, as docs/sampling.md says
        if isinstance(policy, StaticGates):
            policy = Static(np.flatnonzero(~np.asarray(policy.gates)).tolist())
        self.networks = [  # under guidance the second one sees no prompt
            Network(
                compared, out.gates[:, :, number + half * len(out.tokens)], depth, gate_keys[half],
                model, prompt, self.layout, cache, policy,
            )
            for half in range(1 + (sampler.cfg_scale > 0))
        ]  # fmt: skip

    def follow(self):
        canvas = self.networks[0].tokens
        for call, after in enumerate(self.canvases):
            block, step = divmod(int(self.steps[call]), self.limit)
            if self.is_ancestral:
                block, step = 0, int(self.steps[call])
            if self.own[call]:
                self.follow_call(call, block, step, canvas, after)
            else:
                np.testing.assert_array_equal(self.ended(call, canvas, block), after)
            canvas = after

    def follow_call(self, call, block, step, canvas, after):
        """One call, and what it reveals. Args: canvas, after: the library's, before and after."""
        index, logits = self.run_networks(call, block, step, canvas)
        rule = self.drawn if self.is_ancestral else self.revealed

        def canvases(logits):
            new, shown = rule(logits, block, step, canvas, after, index)
            found = np.repeat(canvas[None], len(logits), axis=0)
            found[:, index] = new
            return np.array([self.ended(call, x, block) for x in found]), shown

        def shaken():
            return canvases(shake(logits, network.weights))

        network = self.networks[0]
        [mine], [shown] = canvases(logits[None])
        what = f"call {call}, canvas after {canvas}"
        self.compared.decision(what, mine, after, lambda: shaken()[0])
        known = self.log_probs[call, index]  # NaN where an end of text filled
        written = (after[index] != canvas[index]) & np.isfinite(known)
        new = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))  # the model's
        new = new[np.arange(len(index)), after[index]]
        self.compared.errors += np.abs(new - known)[written].tolist()
        positions = index - network.shift
        network.confidence[positions] = np.where(written, 0.0, shown)
        network.revealed = list(positions[written])
        if network.cache.drops_tokens:
            network.spread[positions] = shaken()[1].std(axis=0)

    def run_networks(self, call, block, step, canvas):
        """The positions of the tokens that a call predicts, and their logits."""
        first = self.start + block * self.block_length
        block_tokens = np.arange(first, first + self.block_length)
        seen = canvas[: first + self.block_length if self.appends else None]
        logits = []
        for network, hidden in zip(self.networks, (0, self.start), strict=False):
            network.at(call, np.append(np.full(hidden, self.cfg.mask_id), seen[hidden:]))
            positions, skips = network.window(block, step, block_tokens)
            positions, h, _ = network.run_layers(
                positions, block, step, block_tokens if skips else None
            )
            inside = np.isin(positions + network.shift, block_tokens)
            index = positions[inside] + network.shift
            logits.append(network.head(h[inside]))
        if len(logits) == 1:
            return index, logits[0]
        conditional, unconditional = logits
        scale = self.sampler.cfg_scale + 1
        return index, unconditional + scale * (conditional - unconditional)

    # --------------------- what samplers make of logits [N, W, V]: tokens and confidences, [N, W]

    def drawn(self, logits, block, step, canvas, after, index):
        """Of `Ancestral`. Which tokens a call reveals does not depend on the model."""
        masked = canvas[index] == self.cfg.mask_id
        if self.sampler.precision == "exact":
            masked &= after[index] != self.cfg.mask_id
            keys = token_keys(self.noise_key[None], jnp.asarray(index - self.start)[None])
            keys = jnp.broadcast_to(keys, (len(logits), len(index)))
            new = draw_tokens(self.cfg, jnp.asarray(logits, jnp.float32), keys)
        else:
            steps = PublishedSteps(self.sampler, self, self.start, None)
            t = jnp.asarray(self.sampler.times, jnp.float32)[step]
            logits = np.where(np.arange(self.cfg.vocab_size) == self.cfg.mask_id, -np.inf, logits)
            new = np.array([
                steps.draw_tokens(jnp.asarray(x, jnp.float32), t, jnp.asarray(step), self.noise_key)
                for x in logits
            ])  # fmt: skip
        return np.where(masked, new, canvas[index]), np.zeros(new.shape)

    def revealed(self, logits, block, step, canvas, after, index):
        """Of samplers that fill blocks."""
        sampler, mask = self.sampler, self.cfg.mask_id
        window, place = canvas[index], index - self.start
        masked = window == mask

        def each(x):
            return jnp.broadcast_to(jnp.asarray(x), (len(logits), *np.shape(x)))

        first = self.start + block * self.block_length
        remaining = int((canvas[first : first + self.block_length] == mask).sum())
        self.present = remaining if step == 0 else self.present
        info = StepInfo(jnp.asarray(step), each(self.present), each(remaining), each(index - first))
        number = jnp.asarray(block * self.limit + step)
        keys = position_keys(self.noise_key[None], number, jnp.asarray(place)[None])
        keys = jnp.broadcast_to(keys, (len(logits), len(index)))
        logits = self.boosted(logits, block, canvas, index)
        guess, confidence = sampler.propose(self.cfg, logits, keys)
        shown = jnp.where(masked, confidence, 0.0)
        if sampler.delay_eos and not (canvas[self.start :] == self.cfg.eos_id).any():
            early = (canvas[index - 1] == mask) & (index > first)
            confidence = jnp.where((guess == self.cfg.eos_id) & early, 0.0, confidence)
            shown = shown if self.cfg.right_shift else jnp.where(masked, confidence, 0.0)
        commit = masked & sampler.choose(jnp.where(masked, confidence, -jnp.inf), info, keys)
        if sampler.edits:
            commit |= ~masked & (guess != mask) & sampler.revise(logits, guess, each(window))
        return np.asarray(jnp.where(commit, guess, window)), np.asarray(shown)

    def boosted(self, logits, block, canvas, index):
        """The logits in float32, with what a sampler adds to those that end the thinking."""
        sampler, logits = self.sampler, jnp.asarray(logits, jnp.float32)
        if not getattr(sampler, "end_think_ids", ()):
            return logits
        answer = canvas[self.start :]
        candidates = (answer == self.cfg.mask_id) & (
            np.arange(len(answer)) // self.block_length == block
        )
        arrays = (
            jnp.broadcast_to(x, (len(logits), len(x)))
            for x in (index - self.start, answer, candidates)
        )
        how = sampler.end_think_ids, sampler.end_think_boost, sampler.end_think_power
        return boost_end_of_thinking(logits, *arrays, *how)

    def ended(self, call, canvas, block):
        """The canvas after a call, filled behind an end of text or a stop token."""
        canvas, mask, eos = canvas.copy(), self.cfg.mask_id, self.cfg.eos_id
        answer = canvas[self.start :]
        if getattr(self.sampler, "stop_at_eos", False):
            ends, masks = np.flatnonzero(answer == eos), np.flatnonzero(answer == mask)
            if ends.size and masks.size and ends[0] < masks[0]:
                answer[masks] = eos
        later = self.steps[call + 1 :]
        if not later.size or later[0] // self.limit > block:  # the block's last call
            filled = (block + 1) * self.block_length
            if np.isin(answer[:filled], getattr(self.sampler, "stop_ids", ())).any():
                answer[filled:] = eos
        return canvas
