"""Profiles of random numbers, for tests of what reads them."""

import numpy as np

from dials_jax.studies.profile import Moments, Profile, ProfileFacts

BINS = 8


def random_profile(
    label="tiny", sequences=3, steps=4, layers=3, prompt=2, answer=5, family="diffusion", seed=0
):
    """A profile of as many sequences, all of whose numbers are random."""
    random = np.random.default_rng(seed)
    states, length = layers + 1, prompt + answer
    groups, looked_at = (1, ()) if family == "causal" else (steps, (0, layers - 1))

    def moments(*shape):
        return Moments.of(random.uniform(-1, 1, (sequences, *shape)), axis=0)

    def counts(*shape):
        return random.integers(0, 9, shape)

    return Profile(
        facts=ProfileFacts(
            label=label, path=f"models/{label}", family=family, d_model=16, sampler="Confidence()",
            steps=groups, prompt_length=prompt, gen_length=answer, change_layers=looked_at,
            sink_factor=5.0,
        ),
        layer_cosine=moments(groups, layers, length),
        token_cosine=moments(groups, states, length - 1),
        norm=moments(groups, states, length),
        largest_norm=random.uniform(1, 2, (states, length)),
        sinks=counts(states, length),
        layer_histogram=counts(layers, BINS),
        token_histogram=counts(states, BINS),
        sequence_layer=random.uniform(-1, 1, (sequences, layers)),
        sequence_token=random.uniform(-1, 1, (sequences, states)),
        end_token=random.uniform(-1, 1, (sequences, states)),
        prompt_layer=random.uniform(-1, 1, (sequences, layers)),
        change=moments(len(looked_at), 7),
        seconds=float(sequences),
    )  # fmt: skip
