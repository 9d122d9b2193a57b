"""What a generation made, call by call, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.errors import require
from dials_jax.sampling.costs import Calls, Part
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.sampler import CallRecord
from dials_jax.sampling.trajectory import Trajectory
from dials_jax.skipping.flops import Flops
from dials_jax.skipping.observing import Observed, of_sequences

SHOWN_SEQUENCES = 8  # in a notebook


@dataclass(frozen=True, repr=False)
class Generation:
    """Generated sequences and what they cost.

    Attributes:
      tokens: [B, P + G], the prompts (padding as given) and the generated tokens.
      nfe: model calls. Under guidance a call has twice the sequences.
      gates: [nfe, L, R], True where a layer ran. R is B, or 2B under guidance: the conditional
        ones, then the unconditional ones. Under a schedule L is that of the deepest model that
        takes steps, and layers that a model does not have are False.
      masked_share: [nfe, R], masked share of the generated part before each call.
      own: [nfe, B], False where a sequence was finished and the call was made for others.
      num_tokens: [B], tokens up to and with the first end of text or of turn, or stop token of the
        sampler; all without one.
      tokens_run: [nfe, L], tokens per sequence that a layer computes where it runs.
      steps: [nfe], the denoising step of each call. `Ancestral` leaves out the steps that reveal
        nothing in a sequence: with it, this only names the model's run of steps.
      flops: the three numbers of `dials_jax.skipping.flops`; shares are relative to equally many
        calls on the whole canvas by the largest of the models.
      log_probs: [B, G], log-probability in nats of each generated token under the model at the step
        that revealed it (see `sampler.keep_log_probs`); NaN where no step did, as after an end
        of text. Given the tokens known then, so their sum is no log-likelihood of the text. None
        unless asked for.
      observed: what the hidden states were like, where an observer was given.
      trajectory: what every call did to every canvas. None unless asked for.
    """

    tokens: Int[np.ndarray, "B T"]
    nfe: int
    gates: Bool[np.ndarray, "S L R"]
    masked_share: Float[np.ndarray, "S R"]
    own: Bool[np.ndarray, "S B"]
    num_tokens: Int[np.ndarray, "B"]
    tokens_run: Int[np.ndarray, "S L"]
    steps: Int[np.ndarray, "S"]
    flops: Flops
    log_probs: Float[np.ndarray, "B G"] | None = None
    observed: Observed | None = None
    trajectory: Trajectory | None = None

    def __repr__(self) -> str:
        """A line about the whole, and a row for each of the first sequences."""
        num_sequences, length = self.tokens.shape
        flops = self.flops
        lines = [
            f"Generation({num_sequences} x {length} tokens, {self.nfe} calls, layers run "
            f"{flops.layers_run:.1%}, FLOPs {flops.flops_share:.1%}, {flops.seconds:.3g} s)",
            "sequence  tokens  passes  tokens/pass  layers run",
        ]
        passes, layers_run = self.passes, self.layers_run
        for i in range(min(num_sequences, SHOWN_SEQUENCES)):
            rate = self.num_tokens[i] / max(passes[i], 1)
            lines.append(
                f"{i:8}  {self.num_tokens[i]:6}  {passes[i]:6}  {rate:11.2f}  {layers_run[i]:10.1%}"
            )
        more = num_sequences - SHOWN_SEQUENCES
        return "\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])])

    @cached_property
    def passes(self) -> Int[np.ndarray, "B"]:
        """Model calls of each sequence until it was finished: as many as it takes alone."""
        return self.own.sum(axis=0)

    @cached_property
    def layers_run(self) -> Float[np.ndarray, "B"]:
        """The share of the layers that ran in each sequence's own calls, of both halves under
        guidance."""
        halves = self.gates.reshape(*self.gates.shape[:2], -1, len(self.tokens))
        of_call = halves.mean(axis=(1, 2))
        return np.where(self.own, of_call, 0.0).sum(axis=0) / np.maximum(self.passes, 1)

    @property
    def tokens_per_pass(self) -> Float[np.ndarray, "B"]:
        """How many tokens a pass gave each sequence, those after its end of text left out."""
        return self.num_tokens / self.passes


def account(
    tokens, record: CallRecord, roles, turns: Schedule, sampler, cache, prompts, seconds: float
) -> Generation:
    """Leaves out the sequences that only pad the batch, and counts FLOPs."""
    nfe, num_sequences, (_, length) = int(record.nfe), len(prompts), tokens.shape
    require(
        nfe <= len(record.variant),
        f"{nfe} model calls are more than the record's {len(record.variant)}; "
        "give the sampler more slots",
    )
    gates, variant, steps = record.gates[:nfe], record.variant[:nfe], record.step[:nfe]
    gates = gates[..., np.arange(gates.shape[-1]) % len(tokens) < num_sequences]  # in both halves
    share = np.tile(record.masked_share[:nfe, :num_sequences], gates.shape[-1] // num_sequences)
    own = record.own[:nfe, :num_sequences]
    counted = np.tile(own, gates.shape[-1] // num_sequences)
    parts = [
        Part(model.config, policy, sampler.work(model.config, cache, prompts.shape[1]))
        for model, policy in roles.values()
    ]
    number = {letter: i for i, letter in enumerate(roles)}
    # A call after the last step is that of its model.
    letters = np.array([number[letter] for letter in turns.each_step])
    taken = letters[np.minimum(steps, len(letters) - 1)]
    calls = Calls(parts, taken, gates, counted, variant, length)
    tokens_run = np.zeros((nfe, gates.shape[1]), int)
    for i, part in enumerate(parts):
        mine = taken == i
        if mine.any():
            tokens_run[mine, : part.cfg.num_layers] = part.tokens(variant[mine])
    trajectory = None
    if record.canvases is not None:
        costs = calls.by_sequence(num_sequences)
        canvases = (x[:nfe, :num_sequences] for x in record.canvases)
        trajectory = Trajectory(*canvases, *costs)
    tokens, log_probs = tokens[:num_sequences], record.log_probs
    if log_probs is not None:
        log_probs = log_probs[:num_sequences, prompts.shape[1] :]
    return Generation(
        tokens=tokens,
        nfe=nfe,
        gates=gates,
        masked_share=share,
        own=own,
        num_tokens=count_tokens(
            parts[0].cfg, tokens[:, prompts.shape[1] :], getattr(sampler, "stop_ids", ())
        ),
        tokens_run=tokens_run,
        steps=steps,
        flops=calls.total(seconds),
        log_probs=log_probs,
        observed=of_sequences(record.observed, num_sequences),
        trajectory=trajectory,
    )


def count_tokens(
    cfg: ModelConfig, answers: Int[np.ndarray, "B G"], stop_ids: tuple[int, ...] = ()
) -> Int[np.ndarray, "B"]:
    """Tokens of each answer up to and with its first end of text or of turn, or stop token."""
    ends = [i for i in (cfg.eos_id, cfg.eot_id, *stop_ids) if i is not None]
    ends = np.isin(answers, ends)
    return np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, answers.shape[1])
