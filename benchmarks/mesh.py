"""Runs every policy with every cache on every mesh: `python -m benchmarks.mesh --help`.

Three tables. `--part equal` runs a small model in float32 on all devices and on one: all tokens and
gates must be equal. `--part timed` runs a model of true width in bfloat16, in turns with one
device: `against_one` is its time divided by that of one device with the sequences of one batch
shard. All batch shards get the same sequences, so that they run the same layers. `--part runs` does
so once on all devices alone, which leaves room for the whole model: no token may be left blank, and
all batch shards must return the same tokens.

A case that fails is a row of its table, and the exit status is then 1. On a machine without
accelerators, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes devices to try it with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.command import add_cases, add_generation, add_layout, add_model, make_main
from benchmarks.decode import check_cases, parse_policy
from benchmarks.random_model import make_config, make_model, make_routers
from benchmarks.report import LiveTable, run_and_count_compilation
from dials_jax import sharding, trees
from dials_jax.caching.parse import parse_cache
from dials_jax.compiling import forget_programs
from dials_jax.config import MeshConfig, ModelConfig, RouterConfig
from dials_jax.errors import InputError, nearest, require
from dials_jax.keys import seed_key
from dials_jax.models import families
from dials_jax.models.groups import Layout
from dials_jax.models.model import Model, sequence_keys
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.generation import Generation
from dials_jax.skipping.routed import Routed, init_routers

COLUMNS = {
    "mesh": "<16", "cache": "<8", "policy": "<10", "sequences": ">9d", "layers_run": ">10.3f",
    "ms_a_call": ">9.2f", "one_ms_a_call": ">13.2f", "against_one": ">11.3f",
    "compile_s": ">9.1f", "result": "<40",
}  # fmt: skip
CACHES = ("none", "prefix", "dual", "es-16-4")
POLICIES = ("full", "static-2", "random-2", "routed-2")


def make_meshes(num_devices: int) -> dict[str, MeshConfig]:
    """All meshes of the devices with one axis, or with two axes of equal size, by name."""
    found = {f"{axis} {num_devices}": {axis: num_devices} for axis in sharding.AXES}
    side = round(num_devices**0.5)
    if side > 1 and side * side == num_devices:
        for pair in (("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor")):
            found[" x ".join(f"{axis} {side}" for axis in pair)] = dict.fromkeys(pair, side)
    return {name: MeshConfig(**{"data": 1, **axes}) for name, axes in found.items()}


def make_varied_routers(model: Model) -> Routed:
    """Makes routers whose skips differ between sequences, layers and steps."""
    cfg = model.config
    routers = init_routers(
        cfg.d_model, cfg.num_layers, RouterConfig(d_hidden=16, execute_bias=0.0), seed_key(1)
    )
    routers["vote"] = 20 * jax.random.normal(seed_key(2), routers["vote"].shape)
    if trees.is_unrolled(model.params["layers"]):
        routers = trees.unstack(routers)
    return Routed(jax.device_put(routers, sharding.replicated(model.mesh)), 0.3)


class Part:
    """One part of the benchmark: a model, on any mesh, and the generations to compare.

    Args:
      prompt: tokens per prompt.
      make_routed: makes the routers of a model, which skip the given number of layers.
      scale: factor of all weights but the norms'; large weights tell sequences apart.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        sampler: Confidence,
        prompt: int,
        make_routed: Callable[[Model, int], Policy],
        scale: float = 1.0,
        layout: Layout = "auto",
    ):
        self.cfg, self.sampler, self.prompt = cfg, sampler, prompt
        self._make_routed, self._scale, self._layout = make_routed, scale, layout

    def make_model(self, mesh: Mesh) -> Model:
        """The model on a mesh; the weights do not depend on it."""
        model = make_model(self.cfg, self._layout, mesh=mesh)
        if self._scale == 1:
            return model

        def scaled(name, x):
            return x if "norm" in name else self._scale * x

        return Model(self.cfg, trees.map_named(scaled, model.params), mesh)

    def generate(
        self, model: Model, cache: str, policy: str, sequences: int, copies: int = 1
    ) -> tuple[Generation, float]:
        """Generates; also returns the seconds that the program took to compile.

        Args:
          sequences: number of different ones.
          copies: of every sequence, one for each batch shard.
        """
        rng = np.random.default_rng(0)
        highest = min(1000, self.cfg.vocab_size // 2)
        prompts = rng.integers(2, highest, (sequences, self.prompt))
        first = np.linspace(0, self.prompt // 2, sequences).astype(int)
        valid = np.arange(self.prompt) >= first[:, None]
        keys = sequence_keys(seed_key(3), sequences)
        return run_and_count_compilation(
            generate,
            model,
            np.tile(prompts, (copies, 1)),
            np.tile(valid, (copies, 1)),
            sampler=self.sampler,
            cache=parse_cache(cache),
            policy=parse_policy(policy, model.num_layers, partial(self._make_routed, model)),
            key=jnp.concatenate([keys] * copies),
        )


def make_equal_part() -> Part:
    cfg = families.llada_small(
        8, 64, 512, mask_id=511, eos_id=1, pad_id=0, head_dim=16, num_kv_heads=2, dtype="float32"
    )
    sampler = Confidence(gen_length=16, block_length=8, steps=16)
    return Part(cfg, sampler, 16, lambda model, _: make_varied_routers(model), scale=4.0)


def make_timed_part(options: argparse.Namespace) -> Part:
    cfg = make_config(options.model, options.layers)
    sampler = Confidence(gen_length=options.gen, block_length=options.block, steps=options.gen)
    return Part(cfg, sampler, options.prompt, make_routers, layout=options.layout)


def compare_case(part: Part, one: Model, model: Model, cache: str, policy: str) -> dict[str, Any]:
    """Runs the same sequences on one device and on all, and counts differences."""
    expected, _ = part.generate(one, cache, policy, 8)
    out, compile_s = part.generate(model, cache, policy, 8)
    differ = {
        "tokens": np.sum(out.tokens != expected.tokens),
        "gates": np.sum(out.gates != expected.gates) if out.nfe == expected.nfe else -1,
    }
    words = [f"{count} {what} differ" for what, count in differ.items() if count]
    return {
        "result": ", ".join(words) or "equal", "sequences": 8, "compile_s": compile_s,
        "layers_run": out.flops.layers_run,
    }  # fmt: skip


def time_case(
    part: Part, one: Model, model: Model, cache: str, policy: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Times the same sequences on every batch shard, in turns with one device; medians."""
    copies = sharding.num_batch_shards(model.mesh)

    def on_one():
        return part.generate(one, cache, policy, options.batch)

    def on_all():
        return part.generate(model, cache, policy, options.batch, copies)

    on_one()
    out, compile_s = on_all()
    pairs = [(on_one()[0], on_all()[0]) for _ in range(options.repeats)]
    seconds = np.array([[x.flops.seconds for x in pair] for pair in pairs])
    base, mine = np.median(seconds, axis=0)
    return {
        "result": "runs", "sequences": options.batch * copies, "compile_s": compile_s,
        "layers_run": out.flops.layers_run, "ms_a_call": 1e3 * mine / out.nfe,
        "one_ms_a_call": 1e3 * base / out.nfe, "against_one": mine / base,
        "all_seconds": seconds.tolist(),
    }  # fmt: skip


def run_case(
    part: Part, _: None, model: Model, cache: str, policy: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs the same sequences on every batch shard, once."""
    copies = sharding.num_batch_shards(model.mesh)
    out, compile_s = part.generate(model, cache, policy, options.batch, copies)
    answers = out.tokens[:, part.prompt :].reshape(copies, options.batch, -1)
    wrong = {
        "tokens are left blank": np.sum(answers == part.cfg.mask_id),
        "tokens differ between batch shards": np.sum(answers != answers[:1]),
    }
    words = [f"{count} {what}" for what, count in wrong.items() if count]
    return {
        "result": ", ".join(words) or "runs", "sequences": options.batch * copies,
        "compile_s": compile_s, "layers_run": out.flops.layers_run,
        "ms_a_call": 1e3 * out.flops.seconds / out.nfe,
    }  # fmt: skip


def run_table(
    part: Part,
    one: Model | None,
    measure: Callable[..., dict[str, Any]],
    meshes: dict[str, MeshConfig],
    options: argparse.Namespace,
    table: LiveTable,
) -> int:
    """Fills the table; returns the number of cases that failed or differ."""
    failures = 0
    for name, mesh in meshes.items():
        model = part.make_model(sharding.make_mesh(mesh))
        for cache in options.caches:
            for policy in options.policies:
                try:
                    found = measure(part, one, model, cache, policy)
                except InputError:  # about the options: no case would run
                    raise
                except Exception as error:  # for example of the compiler: it belongs in the table
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    found = {"result": f"fails: {reason[:300]}"}
                failures += found["result"] not in ("equal", "runs")
                table.add_row(mesh=name, cache=cache, policy=policy, **found)
            forget_programs()
    return failures


def select_meshes(
    names: Sequence[str] | None, known: dict[str, MeshConfig]
) -> dict[str, MeshConfig]:
    """Selects meshes by short names: `data 2 x tensor 2` is `data2-tensor2`. None selects all."""
    if names is None:
        return known
    short = {name.replace(" x ", "-").replace(" ", ""): name for name in known}
    for name in names:
        require(name in short, f"mesh {name!r} is not known{nearest(name, short)}")
    return {short[name]: known[short[name]] for name in names}


def run(options: argparse.Namespace) -> int:
    count = jax.device_count()
    require(count > 1, "one device is no mesh; run it on a machine with several")
    meshes = select_meshes(options.meshes, make_meshes(count))
    failures = 0
    measures = {
        "equal": compare_case,
        "timed": partial(time_case, options=options),
        "runs": partial(run_case, options=options),
    }
    for name, measure in measures.items():
        if name not in options.part:
            continue
        part = make_equal_part() if name == "equal" else make_timed_part(options)
        check_cases(options, part.cfg.num_layers)
        out = options.out and f"{options.out}_{name}.json"
        table = LiveTable(COLUMNS, out, vars(options) | {"part": name})
        with jax.default_matmul_precision("highest" if name == "equal" else "default"):
            alone = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
            one = None if name == "runs" else part.make_model(alone)
            failures += run_table(part, one, measure, meshes, options, table)
    print(f"{failures} cases failed or differ")
    return failures


def add_options(parser: argparse.ArgumentParser) -> None:
    parts = ["equal", "timed", "runs"]
    parser.add_argument("--part", nargs="+", default=["equal", "timed"], choices=parts)
    parser.add_argument("--meshes", nargs="+", help="such as data4 data2-tensor2; default: all")
    add_cases(parser, CACHES, POLICIES)
    timed = parser.add_argument_group("of the parts timed and runs")
    add_model(timed)
    timed.add_argument("--layers", type=int, default=8, help="number of layers")
    add_generation(timed, gen=64, block=32)
    add_layout(timed, weights=False)
    timed.add_argument("--repeats", type=int, default=5, help="timed generations of each")
    parser.add_argument("--out", metavar="PREFIX", help="writes PREFIX_equal.json, and so on")


main = make_main("mesh", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
