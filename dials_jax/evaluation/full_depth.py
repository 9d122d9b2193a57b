"""How far a policy's predictions are from those of the full model, token by token.

Both run on the same states: texts that the full model generated itself, so that every token is one
that it decided about. Of a masked diffusion model, tokens of the text are masked as for
likelihoods, and KL(full || policy) is averaged over the masked ones. That stands for the states of
its own trajectory, whose order of revealing is not stored. A causal model's trajectory is the text:
one pass predicts every token from those before it. Tasks that generate nothing take the right
answers. Guidance is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dials_jax import sharding
from dials_jax.compiling import timed_jit
from dials_jax.data.buckets import batches_by_length, padded_lengths
from dials_jax.data.tasks import Pair
from dials_jax.diffusion.objectives import answer_length, token_kl
from dials_jax.errors import require
from dials_jax.evaluation.items import Item, item_names
from dials_jax.evaluation.likelihood import draw_masked
from dials_jax.evaluation.pairs import Pairs, align_pairs, pad_pairs
from dials_jax.evaluation.position_chunks import map_position_chunks
from dials_jax.evaluation.scoring import item_keys
from dials_jax.evaluation.sweep_records import SweepRecords
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import task_sampler
from dials_jax.keys import threefry_key
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.kernels.row_sums import row_log_softmax, row_sum
from dials_jax.nn.policy import Policy
from dials_jax.progress import progress_bar

NUM_COPIES = 8  # masked copies of a text; their numbers of masked tokens are spread evenly
KL_CHUNK = 64  # positions whose logits, of both, are in memory at a time


class _Text(NamedTuple):
    """A text that the full model decided about; `item` has its random key."""

    name: str
    item: Item
    pair: Pair


def measure_kl(
    records: SweepRecords,
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    items: Sequence[Item],
    policies: Sequence[tuple[Mapping[str, Any], Policy | None]],
) -> None:
    """Measures every policy on the texts of the task's first `cfg.kl_items` items.

    Every batch is stored once it is measured; what is stored is not measured again.

    Args:
      policies: as `Candidate.describe` describes them, and themselves. The full one is first.
    """
    (full, _), *others = policies
    texts = _full_texts(task, items, records.outputs(task.name, full), model)[: cfg.kl_items]
    progress = progress_bar(len(others), 0, f"{task.name}, KL", "policy")
    for described, policy in others:
        known = records.kl(task.name, described)
        left = [text for text in texts if text.name not in known]
        for found in kl_batches(model, task, left, policy, cfg.batch_size, cfg.seed):
            records.add(records.about(task.name, described) | {"kl": found})
        progress.update()
    progress.close()


def _full_texts(
    task: EvalTask, items: Sequence[Item], outputs: Mapping[str, Sequence[int]], model: Model
) -> list[_Text]:
    """The full model's outputs, each with the end of text that it wrote, or the right answers.

    Left out are outputs of earlier versions, which stored none, and texts with [MASK].
    """
    cfg, found = model.config, []
    for name, item in zip(item_names(items), items, strict=True):
        answer = list(outputs.get(name, ()) if task.generates else item.answers[item.label])
        if task.generates and name in outputs and cfg.eos_id is not None:
            ended = len(answer) < task_sampler(task, items).gen_length
            answer += [cfg.eos_id] if ended else []
        if answer and cfg.mask_id not in answer:
            found.append(_Text(name, item, (item.prompt, answer)))
    return found


def kl_batches(
    model: Model,
    task: EvalTask,
    texts: Sequence[_Text],
    policy: Policy | None,
    batch_size: int,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Yields the KL of some texts by name, in nats per token: means over tokens, then copies."""
    if not texts:
        return
    cfg, copies = model.config, 1 if model.config.causal else NUM_COPIES
    keys = threefry_key(item_keys(seed, [text.item for text in texts]))
    per_batch = max(1, batch_size // copies)
    lengths = [len(prompt) + len(answer) for _, _, (prompt, answer) in texts]
    sizes = padded_lengths(lengths, task.bucket, task.max_programs, per_batch)
    longest = max(len(text.pair[1]) for text in texts)
    for chosen in batches_by_length(sizes, per_batch):
        pairs = pad_pairs([texts[i].pair for i in chosen], cfg, sizes[chosen[0]], longest)
        pairs = align_pairs(model, pairs)
        rows = np.repeat(np.arange(len(chosen)), copies)
        batch = Pairs(*(x[rows] for x in pairs)), keys[np.asarray(chosen)[rows]]
        numbers = np.tile(np.arange(copies), len(chosen))
        placed = model.place_sequences((*batch, numbers), per_batch * copies)
        found, _ = model.run(kl_program, *placed, policy)
        means = sharding.to_host(found)[: len(rows)].reshape(-1, copies).mean(axis=1)
        require(
            bool(np.isfinite(means).all()),
            "a KL to the full model is NaN or infinite; look for NaN in the model's weights, or "
            "for values that overflow its dtype",
        )
        yield {texts[i].name: float(x) for i, x in zip(chosen, means, strict=True)}


@timed_jit("cfg")
def kl_program(params, pairs, keys, samples, policy, *, cfg) -> Float[Array, "B"]:
    """KL(full || policy) of each copy in nats, the mean over the tokens that are predicted.

    Args:
      pairs: of copies; `keys` and `samples` as in `likelihood.score_pairs_program`.
    """
    mask_keys, gate_keys = jax.vmap(jax.random.split)(keys).T
    gate_keys = jax.vmap(jax.random.fold_in)(gate_keys, samples)
    predicted, tokens = pairs.in_answer, pairs.tokens
    first = tokens.shape[1] - predicted.shape[1]
    if not cfg.causal:
        draw = jax.vmap(draw_masked, (0, 0, 0, None))
        predicted = draw(mask_keys, samples, pairs.in_answer, NUM_COPIES)
        tokens = jnp.where(jnp.pad(predicted, ((0, 0), (first, 0))), cfg.mask_id, tokens)
    time = jnp.sum(predicted, axis=1) / answer_length(pairs.in_answer)

    def states(policy: Policy | None) -> Float[Array, "B A D"]:
        h = transformer.run_layers(
            cfg, params, tokens, pairs.valid, policy, time=time, sequence_keys=gate_keys
        ).h
        if cfg.causal:  # each token is predicted by the state to its left
            return jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)[:, first:]
        return transformer.shift_to_predicted(cfg, h, pairs.valid)[:, first:]

    def log_probs(h: Float[Array, "B C D"]) -> Float[Array, "B C V"]:
        logits = transformer.head_logits(cfg, params, h, time)
        return row_log_softmax(transformer.apply_subs(cfg, logits))

    with jax.default_matmul_precision("highest"):  # the two are close to each other
        full, own = states(None), states(policy)
        kl = map_position_chunks(
            lambda full, own: token_kl(log_probs(full), log_probs(own)), KL_CHUNK, full, own
        )
    return row_sum(kl * predicted) / answer_length(predicted)
