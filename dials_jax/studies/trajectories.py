"""Measures the profile of a model: its hidden states while it fills canvases, or over given texts.

A diffusion model is looked at in every model call of its sampler. A causal model writes a position
once and never changes it, so one forward pass over prompt and answer shows what decoding saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dials_jax import sharding
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import NoCache
from dials_jax.compiling import timed_jit
from dials_jax.evaluation.batched import request_hash, request_keys
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.sampling.generate import generate
from dials_jax.sampling.generation import Generation
from dials_jax.sampling.requests import check_batch
from dials_jax.sampling.sampler import Sampler
from dials_jax.skipping.observing import BatchObserver, Observed, Observer, of_sequences
from dials_jax.studies.profile import Moments, Profile, ProfileFacts

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Trajectories:
    """How the profile of one model is measured; the prompts come batch by batch.

    Attributes:
      prompt_length: prompts are padded on the left to this many tokens.
      batch_size: sequences of the compiled program.
      prompts: a digest of all prompts of the study, for the profile's facts.
    """

    model: Model
    sampler: Sampler
    observer: Observer
    prompt_length: int
    batch_size: int
    label: str = "model"
    seed: int = 0
    prompts: str = ""

    @property
    def facts(self) -> ProfileFacts:
        cfg = self.model.config
        return ProfileFacts(
            label=self.label,
            path=self.model.path,
            family="causal" if cfg.causal else "diffusion",
            d_model=cfg.d_model,
            sampler=str(self.sampler),
            steps=1 if cfg.causal else self.sampler.count_steps(NoCache()),
            prompt_length=self.prompt_length,
            gen_length=self.sampler.gen_length,
            change_layers=self.observer.change_layers,
            sink_factor=self.observer.sink_factor,
            fingerprint=self.model.fingerprint,
            prompts=self.prompts,
        )

    def measure(self, prompts: Prompts, keys: Sequence[int]) -> Profile:
        """The profile of one batch.

        Args:
          keys: one number per prompt; its random numbers depend on this and the seed alone.
        """
        model = self.model
        tokens, valid = pad_prompts(prompts, self.prompt_length, model.config.pad_id)
        causal = model.config.causal
        out = generate(
            model,
            tokens,
            None if valid.all() else valid,
            sampler=self.sampler,
            key=request_keys(self.seed, keys),
            fill_to=self.batch_size,
            observer=None if causal else self.observer,
        )
        observed, seconds = out.observed, out.flops.seconds
        if causal:
            written = decoded_positions(out, valid)
            observed, more = observe_texts(
                model, out.tokens, written, self.prompt_length, self.observer, self.batch_size
            )
            seconds += more
        return as_profile(self.facts, observed, valid.any(axis=1), seconds)


def profile_model(
    model: Model,
    prompts: Prompts,
    sampler: Sampler,
    *,
    observer: Observer | None = None,
    batch_size: int = 8,
    label: str = "model",
    seed: int = 0,
) -> Profile:
    """The profile of a model over prompts of mixed lengths.

    Raises: InputError, before the first batch, for a prompt that `generate` refuses.
    """
    tokens, valid = pad_prompts(prompts, max(map(len, prompts)), model.config.pad_id)
    check_batch(model.config, tokens, valid, sampler)
    run = Trajectories(
        model, sampler, observer or Observer(), tokens.shape[1], batch_size, label, seed
    )
    keys, profile = prompt_keys(prompts), None
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        found = run.measure(prompts[part], keys[part])
        profile = found if profile is None else profile.merge(found)
    return profile


def prompt_keys(prompts: Prompts) -> list[int]:
    """A number per prompt, the same in any order; equal prompts have different ones."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        keys.append(request_hash((prompt, seen[prompt])))
        seen[prompt] += 1
    return keys


def decoded_positions(out: Generation, valid: Bool[np.ndarray, "B P"]) -> Bool[np.ndarray, "B T"]:
    """Where a causal model's prompt is, and the answer up to and with its end of text."""
    answer = np.arange(out.tokens.shape[1] - valid.shape[1]) < out.num_tokens[:, None]
    return np.concatenate([valid, answer], axis=1)


def observe_texts(
    model: Model,
    tokens: Int[np.ndarray, "B T"],
    present: Bool[np.ndarray, "B T"],
    prompt_length: int,
    observer: Observer,
    batch_size: int = 1,
) -> tuple[Observed, float]:
    """What one forward pass over whole texts looks like, and the seconds it took.

    Args:
      present: False at padding on the left, and at what does not count on the right.
      prompt_length: where the answers start.
    """
    valid = present | (np.arange(tokens.shape[1]) >= prompt_length)
    batch = model.place_sequences((tokens.astype(np.int32), valid, present), batch_size)
    counted = np.arange(len(batch[0])) < len(tokens)
    counted = sharding.place_sequences(counted, model.mesh)
    static = {"prompt_length": prompt_length, "observer": observer}
    observed, seconds = model.run(observe_program, *batch, counted, **static)
    return of_sequences(sharding.to_host(observed), len(tokens)), seconds


@timed_jit("cfg", "prompt_length", "observer")
def observe_program(
    params, tokens, valid, present, counted, *, cfg, prompt_length, observer
) -> Observed:
    """One model call on whole texts."""
    observing = BatchObserver(observer, 1, prompt_length, present & counted[:, None])
    inputs = transformer.block_inputs(cfg, valid, tokens.shape)
    net = CanvasModel(cfg, params, None, "auto", inputs, None, None, prompt_length, observing)
    step, own = jnp.asarray(0), jnp.ones(len(tokens), bool)
    seen = net.run_range(tokens, 0, net.length, step).observed
    return net.observe(net.start_observing(tokens), seen, step, own)._replace(previous=None)


def as_profile(
    facts: ProfileFacts, observed: Observed, prompted: Bool[np.ndarray, "B"], seconds: float
) -> Profile:
    """The profile of one batch, on the host. Args: prompted: False for an empty prompt."""
    moments = {
        name: Moments.from_sums(*getattr(observed, name))
        for name in ("layer_cosine", "token_cosine", "norm", "change")
    }
    return Profile(
        facts=facts,
        **moments,
        largest_norm=np.asarray(observed.largest_norm, float),
        sinks=np.asarray(observed.sinks, int),
        layer_histogram=np.asarray(observed.layer_histogram, int),
        token_histogram=np.asarray(observed.token_histogram, int),
        sequence_layer=np.asarray(observed.sequence_layer, float),
        sequence_token=np.asarray(observed.sequence_token, float),
        end_token=np.asarray(observed.end_token, float),
        prompt_layer=np.where(prompted[:, None], np.asarray(observed.prompt_layer, float), np.nan),
        seconds=seconds,
    )
