"""Outlier channels, and what rounding to 8 bits costs every product of a model, with smoothing too.

    python -m benchmarks.eight_bits_ranges --config configs/demo/sweep.py --items 32

Of every product of a layer, and of the head: its inputs on the configuration's first task with
answers, of each a random part masked, and its weight.

  x_channel, w_channel   the largest magnitude of an input channel, the worst channel / the median
  x_token                the largest magnitude of a token's input / its root mean square, the mean
  x_kurtosis             of all inputs; 3 is a normal distribution's
  fp8, int8              || y - y' || / || y || of the product in 8 bits, in per cent
  fp8_s, int8_s          the same where input channels are divided, and the weight's multiplied, by
                         sqrt(largest input / largest weight) of the channel

Source of the smoothing: Xiao et al. 2023 (SmoothQuant, equation 4 with alpha = 0.5).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.command import add_out, make_main
from benchmarks.eight_bits_answers import masked_canvas
from benchmarks.report import LiveTable
from dials_jax.commands import override
from dials_jax.config import ModelConfig
from dials_jax.config_files import load_config
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.items import load_items
from dials_jax.evaluation.task import EvalConfig
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.nn.attention import attend
from dials_jax.nn.block import Block, BlockInputs, gated
from dials_jax.nn.eight_bits import SMALLEST, quantise, xla_matmul
from dials_jax.nn.modules import Form, bind, form_of
from dials_jax.trees import Params

COLUMNS = {
    "layer": "<5", "product": "<8", "x_channel": ">9.1f", "x_token": ">8.1f",
    "x_kurtosis": ">10.1f", "w_channel": ">9.1f", "fp8": ">6.2f", "fp8_s": ">6.2f",
    "int8": ">6.2f", "int8_s": ">6.2f",
}  # fmt: skip
KINDS = ("fp8", "int8")
PRODUCTS = ("qkv", "o", "gate_up", "down")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="of a sweep: model and tasks")
    parser.add_argument("--items", type=int, default=32, help="first items of the task")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    cfg = override(load_config(options.config, EvalConfig), options.fields)
    require(bool(cfg.tasks), "the configuration has no tasks; give one with answers")
    table = LiveTable(COLUMNS, options.out, vars(options))
    model = load(cfg.model, cfg.dtype, layout="unrolled")
    task = cfg.tasks[0]
    items = load_items(task, load_data_tokenizer(task.data, model.path), model.config)
    items = items[: options.items]
    longest = max(len(item.answers[0]) for item in items)
    answers = np.full((len(items), longest), model.config.eos_id)
    for row, item in zip(answers, items, strict=True):
        row[: len(item.answers[0])] = item.answers[0]
    for layer, name, x, weight in products(model, *masked_canvas(model, items, answers, cfg.seed)):
        found = {what: float(number) for what, number in measure(x, weight).items()}
        table.add_row(layer=layer, product=name, **found)


def products(
    model: Model, tokens: Int[np.ndarray, "N T"], valid: Bool[np.ndarray, "N T"]
) -> Iterator[tuple[str, str, Float[Array, "M D"], Float[Array, "D F"]]]:
    """Layer, name, inputs of tokens that are no padding, and weight, of every product in turn."""
    cfg, params = model.config, transformer.prepare_for_inference(model.config, model.params)
    inputs = transformer.block_inputs(cfg, jnp.asarray(valid), tokens.shape)
    h = transformer.embed(cfg, params, jnp.asarray(tokens), inputs)
    run_layer = jax.jit(partial(layer_products, cfg, form_of(params)))
    for number, layer in enumerate(params["layers"]):
        h, found = run_layer(layer, h, inputs)
        for name in PRODUCTS:
            x, weight = found[name]
            yield str(number), name, x[valid], weight
    yield "", "head", transformer.apply_final_norm(cfg, params, h)[valid], params["head"]["kernel"]


def layer_products(
    cfg: ModelConfig, form: Form, layer: Params, h: Float[Array, "N T D"], inputs: BlockInputs
) -> tuple[Float[Array, "N T D"], dict[str, tuple[Array, Array]]]:
    """The layer's output, and by name the inputs and the weights of its products."""
    block, num_tokens = bind(Block, layer, cfg, form=form), h.shape[:2]
    m = block.modulations(inputs)
    normed = block.attention_norm(h, *m[0:2])
    attended = attend(*block.project(h, inputs), inputs.mask)
    between = h + gated(block.attention.out(attended), *m[2:3])
    to_mlp = block.mlp_norm(between, *m[3:5])
    read = {
        "qkv": (normed, "attention", ("q", "k", "v")),
        "o": (attended.reshape(*num_tokens, -1), "attention", ("o",)),
        "gate_up": (to_mlp, "mlp", ("gate", "up")),
        "down": (block.mlp.hidden(to_mlp), "mlp", ("down",)),
    }
    found = {}
    for name, (x, module, weights) in read.items():
        arrays = [layer[module][w].reshape(x.shape[-1], -1) for w in weights if w in layer[module]]
        found[name] = x, jnp.concatenate(arrays, axis=1)
    return block.finish(h, attended, inputs), found


@jax.jit
def measure(x: Float[Array, "M D"], weight: Float[Array, "D F"]) -> dict[str, Float[Array, ""]]:
    """The numbers of a row: those of the ranges, and errors in per cent."""
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    largest, of_weight = jnp.max(jnp.abs(x), axis=0), jnp.max(jnp.abs(weight), axis=1)
    exact = jnp.matmul(x, weight, precision="highest")
    smooth = jnp.sqrt(jnp.maximum(largest, SMALLEST) / jnp.maximum(of_weight, SMALLEST))

    def error(kind, x, weight):
        y = xla_matmul(x.astype(jnp.bfloat16), quantise(weight.astype(jnp.bfloat16).T, kind, 1))
        return 100 * jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)

    centred = x - jnp.mean(x)
    tokens = jnp.max(jnp.abs(x), axis=1) / jnp.sqrt(jnp.mean(x**2, axis=1))
    errors = {kind: error(kind, x, weight) for kind in KINDS}
    smoothed = {f"{kind}_s": error(kind, x / smooth, weight * smooth[:, None]) for kind in KINDS}
    return {
        "x_channel": jnp.max(largest) / jnp.median(largest),
        "x_token": jnp.mean(tokens),
        "x_kurtosis": jnp.mean(centred**4) / jnp.mean(centred**2) ** 2,
        "w_channel": jnp.max(of_weight) / jnp.median(of_weight),
        **errors,
        **smoothed,
    }


main = make_main("eight_bits_ranges", __doc__, add_options, run, takes_fields=True)

if __name__ == "__main__":
    sys.exit(main())
