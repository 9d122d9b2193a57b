"""A profile by plain NumPy, all at once, from the hidden states of every call of every sequence."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dials_jax.reference import Decoder
from dials_jax.skipping.observing import FARTHEST
from dials_jax.skipping.streaming import BINS


class Call(NamedTuple):
    """One model call of one sequence, without padding."""

    step: int
    tokens: np.ndarray  # [T]
    states: np.ndarray  # [L+1, T, D], float64


class Watched(Decoder):
    """The decoder of plain NumPy, which keeps the hidden states of its calls in `calls`."""

    def calls(self):
        self.found = []
        self.decode()
        return [Call(step, tokens, np.stack(states)) for step, tokens, states in self.found]

    def run_layers(self, positions, block, step, block_tokens):
        number = block * self.sampler.steps // self.sampler.num_blocks + step
        embedding = self.params["embed"]["table"][self.tokens[positions]]
        self.found.append((number, self.tokens.copy(), [embedding]))
        return super().run_layers(positions, block, step, block_tokens)

    def layer(self, layer, h, *rest):
        new, positions = super().layer(layer, h, *rest)
        self.found[-1][2].append(new)
        return new, positions


def cosine(a, b):
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def plain_profile(sequences, prompt_length, gen_length, observer, num_steps, mask_id=None):
    """The numbers of a `Profile` by name.

    Args:
      sequences: of each, its calls in order.
    """
    length, bins = prompt_length + gen_length, min(observer.num_step_bins, num_steps)
    layers, tokens, norms, groups = [], [], [], []
    names = ("sequence_layer", "sequence_token", "end_token", "prompt_layer")
    found = {name: [] for name in names}
    for calls in sequences:
        own = length - len(calls[0].tokens)  # padding on the left

        def padded(x, own=own):
            return np.pad(x, ((0, 0), (own, 0)), constant_values=np.nan)

        of_layer = [padded(cosine(c.states[:-1], c.states[1:])) for c in calls]
        of_token = [padded(cosine(c.states[:, :-1], c.states[:, 1:])) for c in calls]
        layers, tokens = layers + of_layer, tokens + of_token
        norms += [padded(np.linalg.norm(c.states, axis=-1)) for c in calls]
        groups += [min(c.step * bins // num_steps, bins - 1) for c in calls]
        answers = [x[:, prompt_length:].mean(axis=1) for x in of_layer]
        found["sequence_layer"].append(np.mean(answers, axis=0))
        pairs = [x[:, prompt_length:].mean(axis=1) for x in of_token]
        found["sequence_token"].append(np.mean(pairs, axis=0))
        found["end_token"].append(end_token(calls[-1], gen_length, mask_id))
        found["prompt_layer"].append(of_layer[0][:, own:prompt_length].mean(axis=1))
    groups = np.array(groups)
    for name, values in (("layer_cosine", layers), ("token_cosine", tokens), ("norm", norms)):
        found[name] = moments(np.array(values), groups, bins)
    found["layer_histogram"] = histograms(np.array(layers))
    found["token_histogram"] = histograms(np.array(tokens))
    norms = np.array(norms)
    found["largest_norm"] = np.nan_to_num(np.nanmax(np.nan_to_num(norms, nan=-np.inf), axis=0))
    median = np.nanmedian(norms, axis=-1, keepdims=True)
    found["sinks"] = (norms > observer.sink_factor * median).sum(axis=0)
    found["change"] = change_by_distance(sequences, gen_length, observer.change_layers)
    return {name: x if name in NESTED else np.array(x) for name, x in found.items()}


def end_token(call, gen_length, mask_id):
    """[L+1], the mean cosine over the answer's pairs of different tokens; NaN without any."""
    tokens, states = call.tokens[-gen_length:], call.states[:, -gen_length:]
    cosines = cosine(states[:, :-1], states[:, 1:])
    here = [mask_id not in (a, b) and a != b for a, b in pairwise(tokens.tolist())]
    return cosines[:, here].mean(axis=1) if any(here) else np.full(len(states), np.nan)


NESTED = ("layer_cosine", "token_cosine", "norm", "change")


def moments(values, groups, bins):
    """(count, mean, m2) over the values of each group."""
    parts = [values[groups == group] for group in range(bins)]
    count = [np.isfinite(x).sum(axis=0) for x in parts]
    mean = [np.nansum(x, axis=0) / np.maximum(np.isfinite(x).sum(axis=0), 1) for x in parts]
    m2 = [np.nansum((x - m) ** 2, axis=0) for x, m in zip(parts, mean, strict=True)]
    mean = np.where(np.array(count) > 0, mean, np.nan)
    return np.array(count), mean, np.array(m2)


def histograms(values):
    """[n, bins] of values [calls, n, T]."""
    edges = np.linspace(-1, 1, BINS + 1)
    rows = np.clip(np.moveaxis(values, 1, 0).reshape(values.shape[1], -1), -1, 1)
    return np.array([np.histogram(row[np.isfinite(row)], edges)[0] for row in rows])


def change_by_distance(sequences, gen_length, change_layers):
    """(count, mean, m2) of 1 - cosine between calls that follow each other, by distance."""
    seen = [[[] for _ in range(2 * FARTHEST + 1)] for _ in change_layers]
    for calls in sequences:
        for old, new in pairwise(calls):
            revealed = np.flatnonzero(old.tokens[-gen_length:] != new.tokens[-gen_length:])
            for position in range(gen_length) if len(revealed) else ():
                nearest = min(revealed, key=lambda j: (abs(position - j), j))
                at = np.clip(position - nearest, -FARTHEST, FARTHEST) + FARTHEST
                for row, layer in zip(seen, change_layers, strict=True):
                    one, two = (c.states[layer + 1, position - gen_length] for c in (old, new))
                    row[at].append(1 - cosine(one, two))
    shape = (len(change_layers), 2 * FARTHEST + 1)
    count = np.array([[len(x) for x in row] for row in seen]).reshape(shape)
    mean = np.array([[np.mean(x) if x else np.nan for x in row] for row in seen]).reshape(shape)
    m2 = np.array([[np.var(x) * len(x) if x else 0.0 for x in row] for row in seen]).reshape(shape)
    return count, mean, m2
