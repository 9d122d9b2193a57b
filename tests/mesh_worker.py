"""Runs training steps, likelihood and generation on a mesh of up to 8 fake CPU devices.

A process of its own, since the number of devices is fixed when JAX starts: `test_mesh.py` starts
it and compares what it writes for each mesh. Usage: python mesh_worker.py FOLDER MESH...
"""

import dataclasses
import os
import re
import sys
import tempfile
from functools import partial
from unittest import mock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import conftest
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dials_jax import digests, sharding, trees
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache
from dials_jax.compiling import programs_used
from dials_jax.config import (
    ArithmeticData,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RouterConfig,
)
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.batches import batch_at
from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.models import groups, transformer
from dials_jax.models.model import Model, sequence_keys
from dials_jax.nn.kernels import cudnn_attention as cudnn
from dials_jax.nn.kernels import hopper_peers, per_device
from dials_jax.nn.kernels.dispatch import LOOKUP
from dials_jax.nn.kernels.hopper_peers import split_refusal, with_flags
from dials_jax.nn.kernels.implementation import dispatch
from dials_jax.nn.kernels.tpu_attention import splash_attention
from dials_jax.nn.kv import KV
from dials_jax.nn.linear import linear
from dials_jax.pods.footprint import read_footprint
from dials_jax.sampling import refill
from dials_jax.sampling.block_diffusion import BlockDiffusion
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.refill import generate_refilled
from dials_jax.skipping.observing import Observer
from dials_jax.skipping.policies import Random
from dials_jax.skipping.routed import Routed
from dials_jax.training.checkpoint import Checkpoints
from dials_jax.training.losses import model_loss, router_loss
from dials_jax.training.optimizer import make_optimizer
from dials_jax.training.step import init_train_state, make_train_step, train_state_shardings

MESHES = {
    "one": (MeshConfig(), 1),
    "data8": (MeshConfig(data=8), 8),
    "data2_fsdp4": (MeshConfig(data=2, fsdp=4), 8),
    "data2_fsdp2_tensor2": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "data2_tensor2": (MeshConfig(data=2, tensor=2), 4),
}
ONLY_EVALUATED = ("data2_tensor2",)
MICROBATCHES = 2
CACHES = [
    ("dual", DualCache()),
    ("skip", EarlySkip((1.0, 0.5), (0.0, 0.5), block_every=4)),
]
OPTIMIZER = make_optimizer(OptimizerConfig(num_steps=10, warmup_steps=1, learning_rate=1e-3), 1)


def train_step(mesh, loss_fn, init, frozen, prefix):
    """Two steps of training: metrics of the second, and the parameters after it; and what a device
    sends in a step, by kind of collective."""
    task = ArithmeticTask(ArithmeticData(num_items=400))
    state = init_train_state(init, OPTIMIZER, mesh, prefix)
    step = jax.jit(
        make_train_step(loss_fn, OPTIMIZER, seed=0, num_microbatches=MICROBATCHES),
        out_shardings=(train_state_shardings(state, mesh, prefix), None),
    )
    with jax.set_mesh(mesh):
        batches = [
            sharding.place_batch(batch_at(task.training_rows, 0, i, 16), mesh) for i in range(2)
        ]
        step = step.lower(state, frozen, batches[0]).compile()
        for batch in batches:
            state, values = step(state, frozen, batch)
    length = batches[0].tokens.shape[1]
    # Hidden states, or their gradients, of all rows of a microbatch at once.
    whole = re.findall(rf"f32\[{16 // MICROBATCHES},{length},\d+\]", step.as_text())
    sent = {kind: size for kind, (size, _) in read_footprint(step).sent().items()}
    means = {name: mean.value for name, mean in values.items()}
    return {"params": state.params, "values": means, "whole": len(whole)}, sent


def evaluate_in_place(*args):
    """`evaluate`, where the compiler would leave a generation's state whole on every device.

    A state that moves between programs is an error: those of one generation refuse it by
    themselves, and those of the queue are watched.
    """
    keep, put, kept = sharding.keep_placed, jax.device_put, []

    def keep_a_whole_one(state, placement):
        kept.append(type(state).__name__)
        whole = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), state)
        return keep(whole, placement)

    def put_back(x, device=None, **settings):
        if isinstance(device, refill.Ring):
            for (path, leaf), placement in zip(
                jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(device), strict=True
            ):
                name = jax.tree_util.keystr(path)
                assert leaf.sharding.is_equivalent_to(placement, leaf.ndim), f"{name} moves"
        return put(x, device, **settings)

    with (
        mock.patch.object(sharding, "keep_placed", keep_a_whole_one),
        mock.patch.object(jax, "device_put", put_back),
    ):
        found = evaluate(*args)
    assert "Ring" in kept and len(set(kept)) > 1, kept
    return found


def evaluate(mesh, cfg, params, routers):
    model = Model(cfg, params, mesh)
    # What meshes compact is compared with what one device selects: few branches to compile.
    policy = Routed(routers, np.array([0.3, 0.2, 0.4, 0.3]), votes="soft")
    how = {"policy": policy, "executor": "select" if mesh.size == 1 else "compact"}
    prompts = np.asarray(jax.random.randint(jax.random.key(5), (8, 6), 2, 60))
    valid = np.arange(6) >= np.arange(8)[:, None] % 3
    sampler = Confidence(8, 4, temperature=0.5, entropy_bound=1.0, edit_threshold=0.2)
    out = generate(model, prompts, valid, sampler=sampler, **how)
    cached = {name: generate_over(cache, model, prompts, valid, how) for name, cache in CACHES}
    wide = {**how, "policy": policy, "cache": DualCache()}
    ends = Confidence(8, 4, threshold=0.5, stop_at_eos=True)
    keys = sequence_keys(jax.random.key(8), 16)
    refilled = generate_refilled(
        model, [p[:n] for p in prompts for n in (4, 6)],
        sampler=ends, keys=keys, batch_size=8, length=6, **wide,
    )  # fmt: skip
    causal = dataclasses.replace(cfg, block_length=4, right_shift=True)
    parts = BlockDiffusion(8, 4, threshold=0.1, sub_block_length=2)
    block_causal = Model(causal, params, mesh)
    in_parts = generate(block_causal, prompts, valid, sampler=parts, **wide)
    by_request = sorted(refilled, key=lambda one: one.request)
    pairs = pad_pairs([(p[:3].tolist(), p[3:].tolist()) for p in prompts], cfg)
    keys = sequence_keys(jax.random.key(7), 8)
    scores, _ = score_pairs(model, pairs, keys, np.arange(8), stratum=8, **how)
    observer = Observer(num_step_bins=2, change_layers=(1,))
    watched = {"sampler": Confidence(8, steps=4), "observer": observer}
    seen = generate(model, prompts, valid, **watched).observed
    return {
        "tokens": out.tokens,
        "gates": out.gates,
        "log_likelihood": scores.log_likelihood,
        "scored_gates": scores.gates,
        "cached": cached,
        "blocks": {"tokens": in_parts.tokens, "gates": in_parts.gates},
        "observed": {
            "count": seen.layer_cosine.count,
            "layers": seen.layer_cosine.mean,
            "neighbours": seen.token_cosine.mean,
            "histogram": seen.layer_histogram.sum(axis=1),
            "sequence": seen.sequence_layer,
            "end": seen.end_token,
            "change": seen.change.mean,
        },
        "refilled": np.stack([one.out.tokens[0] for one in by_request]),
    }


def generate_over(cache, model, prompts, valid, how):
    sampler = Confidence(8, 8, 8, temperature=0.5)
    out = generate(model, prompts, valid, sampler=sampler, cache=cache, **how)
    return {"tokens": out.tokens, "gates": out.gates}


def look_up(mesh, vocab_size, d_model):
    """Rows of a table and its gradient, whether or not the mesh divides its sides."""
    table_key, token_key, weight_key = jax.random.split(jax.random.key(1), 3)
    table = jax.random.normal(table_key, (vocab_size, d_model))
    tokens = jax.random.randint(token_key, (8, 6), 0, vocab_size)
    weights = jax.random.normal(weight_key, (8, 6, d_model))

    def weighted(table):
        h = dispatch(LOOKUP, table, tokens, "float32")
        return jnp.sum(h * weights), h

    with jax.set_mesh(mesh):
        gradient, h = jax.jit(jax.grad(weighted, has_aux=True))(table)
    return {"h": h, "gradient": gradient}


def attend(mesh, inside):
    """The TPU kernel and its gradient, by itself or where rows are split already."""
    q_key, k_key, v_key, weight_key = jax.random.split(jax.random.key(2), 4)
    q, weights = (jax.random.normal(key, (8, 128, 4, 8)) for key in (q_key, weight_key))
    kv = KV(*(jax.random.normal(key, (8, 128, 2, 8)) for key in (k_key, v_key)))
    valid = jnp.arange(128) >= 3 * jnp.arange(8)[:, None]
    kernel = partial(splash_attention, causal=False, interpret=True)
    if inside:
        rows = P(sharding.BATCH_AXES)
        axes = set(sharding.BATCH_AXES)
        kernel = jax.shard_map(
            kernel, in_specs=rows, out_specs=rows, axis_names=axes, check_vma=False
        )

    def weighted(q, kv):
        out = kernel(q, kv, valid)
        return jnp.sum(out * weights), out

    with jax.set_mesh(mesh):
        gradients, out = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(q, kv)
    return {"out": out, "q": gradients[0], "k": gradients[1].k, "v": gradients[1].v}


@partial(custom_partitioning, static_argnums=(4,))
def partitioned_attention(q, k, v, mask, causal):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _partition(causal, mesh, arg_shapes, result_shape):
    q, k, v, _ = (x.sharding.spec for x in arg_shapes)
    if not q == k == v:
        raise ValueError("queries, keys and values are split in different ways, says cuDNN too")
    spec = P(*q, *[None] * (4 - len(q)))
    split, mask = NamedSharding(mesh, spec), NamedSharding(mesh, P(spec[0]))

    def local(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)

    return mesh, local, split, (split, split, split, mask)


partitioned_attention.def_partition(
    partition=_partition,
    infer_sharding_from_operands=lambda causal, mesh, args, result: args[0].sharding,
    sharding_rule="b t n h, b s n h, b s n h, b o t s -> b t n h",
    need_replication_factors=("t", "h", "s", "o"),
)


def generate_as_on_gpus(mesh, cfg, params, routers):
    """Gates a sequence, where attention is a call with its own rules for splitting, as cuDNN's."""
    calls = []

    def cudnn_attention(q, kv, attn_mask, causal):
        calls.append(q.shape)
        if attn_mask is None:
            attn_mask = jnp.ones((q.shape[0], 1, q.shape[1], kv.k.shape[1]), bool)
        return partitioned_attention(q, *kv, attn_mask, causal)

    plain = per_device.on_gpu, cudnn.cudnn_fits, cudnn.cudnn_attention
    per_device.on_gpu, cudnn.cudnn_fits = lambda: True, lambda q: True
    cudnn.cudnn_attention = cudnn_attention
    prompts = np.asarray(jax.random.randint(jax.random.key(6), (8, 6), 2, 60))
    valid = np.arange(6) >= np.arange(8)[:, None] % 3
    policies = {"routed": Routed(routers, 0.3), "random": Random(1), "full": None}
    model, found = Model(cfg, params, mesh), {}
    grouped_cfg = conftest.small_config(num_kv_heads=1)  # no axis splits its keys and values
    grouped = Model(grouped_cfg, conftest.init_params(grouped_cfg), mesh)
    for policy, cache in (("routed", None), ("random", DualCache()), ("full", None)):
        out = generate(
            grouped if policy == "full" else model, prompts, valid, sampler=Confidence(4, 4, 2),
            policy=policies[policy], cache=cache,
            executor="auto" if policy == "full" or mesh.size > 1 else "select",
        )  # fmt: skip
        found[policy] = {"tokens": out.tokens, "gates": out.gates}
    per_device.on_gpu, cudnn.cudnn_fits, cudnn.cudnn_attention = plain
    assert calls
    return found


def in_eight_bits(mesh, cfg, routers):
    """Logits where a token's largest magnitude, and the sum of its products, span devices."""
    model = Model(cfg, conftest.in_eight_bits(conftest.init_params(cfg), "int8"), mesh)
    head = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), model.params["head"]["kernel"])
    assert head.values[0] == head.scales[0] == cfg.vocab_size // mesh.shape["tensor"]
    split = model.params["layers"]["mlp"]["down"].values.sharding.shard_shape((4, 32, 64))
    assert mesh.shape["tensor"] == 1 or split[2] < 64
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (8, 12), 2, 60))
    valid = np.arange(12) >= np.arange(8)[:, None] % 3
    how = {"policy": Routed(routers, 0.3), "executor": "select" if mesh.size == 1 else "compact"}
    return {
        "full": model.apply(tokens, valid).logits,
        "routed": model.apply(tokens, valid, **how).logits,
    }


def multiply(mesh):
    """A function of each device's own rows, and how many those are."""
    x, weights = (jax.random.normal(jax.random.key(n), (8, 8)) for n in range(2))

    def own(x, weights):
        return jnp.concatenate([x @ weights, jnp.full((len(x), 1), len(x))], axis=1)

    with jax.set_mesh(mesh):
        out = jax.jit(partial(per_device.sequences_per_device, own))(x, weights)
    splits = sharding.num_batch_shards(mesh)
    assert (out[:, -1] == 8 // splits).all()
    return {"out": out[:, :-1]}


def multiply_split(mesh):
    """The ways out of an MLP and of attention, split over two devices, their gradients, and layers.

    The kernels that add the devices' parts need GPUs; a sum of JAX's stands for them.
    """
    x, down, heads, out, h = (
        0.3 * jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate(
            [(2, 16, 64), (64, 128), (2, 16, 8, 4), (8, 4, 128), (2, 16, 128)]
        )
    )
    cfg = conftest.small_config(mask_id=63)
    params, tokens = transformer.init(cfg, jax.random.key(5)), jnp.arange(64).reshape(2, 32) % 60
    taken = []

    def add(part, flags, added_to, axis):
        taken.append((part.shape, added_to is not None))
        total = jax.lax.psum(part + flags[0], axis)
        return total if added_to is None else added_to + total

    @with_flags
    def both(x, down, heads, out, h):
        of_mlp = linear(x, down, split=True, added_to=h)
        heads = heads * jnp.tanh(of_mlp[..., :1, None])  # one sum after the other
        return of_mlp, linear(heads, out, axes="BTNH,NHD->BTD", split=True)

    def loss(*args):
        return sum(jnp.sum(jnp.sin(y)) for y in both(*args))

    devices = mesh.devices.ravel()[None, None, :2]
    split = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with (
        jax.set_mesh(split),
        mock.patch.object(jax, "local_device_count", lambda: split.size),
        mock.patch.object(per_device, "on_hopper", lambda: True),
        mock.patch.object(hopper_peers, "reads_peers", lambda: True),
        mock.patch.object(hopper_peers, "sum_over_peers", add),
        mock.patch.object(
            hopper_peers, "make_flags", lambda: jnp.zeros(hopper_peers.NUM_FLAGS, jnp.int32)
        ),
    ):
        args = x, down, heads, out, h
        gradients = jax.jit(jax.grad(loss, range(5)))(*args)
        assert not taken, "what gradients pass through has XLA's sums"
        values = jax.jit(both)(*args)
        sums = [((2, 16, 128), True), ((2, 16, 128), False)]
        assert taken == sums * (split.size == 2)
        layers = jax.jit(lambda *args: transformer.run_layers(cfg, *args, None).h)(params, tokens)
        assert taken[2:] == [((2, 32, cfg.d_model), True)] * 2 * (split.size == 2)
        if split.size == 2:
            refusal = partial(split_refusal, None, x, down, "...D,DF->...F", None)
            assert with_flags(refusal)() is None
            assert "stack of layers" in refusal()
            with jax.set_mesh(Mesh(devices[:, :, ::-1], sharding.AXES)):
                assert "order" in refusal()
    return {"values": values, "gradients": gradients, "layers": layers}


def with_own_arrays(mesh, cfg, params):
    """Logits of layers with their own arrays and joined ones, placed as the rules say.

    And what a device sends in a pass: joined weights are not to move.
    """
    tokens = np.random.default_rng(0).integers(2, 60, (8, 6))
    logits, sent = {}, {}
    for layout in ("unrolled", "fused"):
        model = Model(cfg, groups.place(cfg, params, mesh, layout), mesh)
        with programs_used() as programs:
            logits[layout] = model.apply(tokens).logits
        sent[layout] = sum(size for size, _ in read_footprint(programs[0]).sent().values())
    placement = sharding.param_shardings(model.params, mesh)
    for (name, leaf), wanted in zip(
        trees.named_leaves(model.params), jax.tree.leaves(placement), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), f"{name} lies elsewhere"
    return {"logits": logits, "fused_more": sent["fused"] > sent["unrolled"]}


def save_and_give_away(mesh, cfg, params):
    """The digest of weights that the next step took over while they were being saved."""
    placed = Model(cfg, jax.tree.map(jnp.copy, params), mesh).params
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    double = jax.jit(partial(jax.tree.map, lambda x: x + x), donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(1, placed)
        double(placed)
        assert all(x.is_deleted() for x in jax.tree.leaves(placed))
        checkpoints.wait()
        return digests.digest(checkpoints.restore(shapes))


def run(mesh, only_evaluated):
    cfg, objective = conftest.small_config(), ObjectiveConfig()
    # Weights so large that rows differ, and routers that skip some layers for some of them.
    params = conftest.amplify(conftest.init_params(cfg), 8)
    routers = conftest.random_routers(cfg)
    evaluation = evaluate_in_place(mesh, cfg, params, routers)
    if only_evaluated:
        return {"evaluation": evaluation}
    router_cfg = RouterConfig(d_hidden=8, skip_threshold=0.3)
    model = Model(cfg, params, mesh)
    placed = model.params
    unrolled = Model(cfg, params | {"layers": trees.unstack(params["layers"])}, mesh)
    new_model = partial(transformer.init, cfg, jax.random.key(0))
    same_routers = partial(jax.tree.map, jnp.copy, routers)
    trained, sent = train_step(mesh, model_loss(cfg, objective, True), new_model, {}, "")
    loss = router_loss(cfg, router_cfg, objective, False)
    return {
        "digest": digests.digest(placed),
        "saved": save_and_give_away(mesh, cfg, params),
        "fingerprint": {"stacked": model.fingerprint, "unrolled": unrolled.fingerprint},
        "model": trained,
        "sent": sent,
        "router": train_step(mesh, loss, same_routers, placed, "routers/")[0],
        "evaluation": evaluation,
        "layouts": with_own_arrays(mesh, cfg, params),
        "eight_bits": in_eight_bits(mesh, cfg, routers),
        "partitioned": generate_as_on_gpus(mesh, cfg, params, routers),
        "lookup": {f"{v}x{d}": look_up(mesh, v, d) for v, d in ((64, 32), (63, 32), (64, 30))},
        "kernel": {
            "alone": attend(mesh, False),
            "inside": attend(mesh, True),
            "rows": multiply(mesh),
            "split": multiply_split(mesh),
        },
    }


def main(folder, *names):
    for name in names:
        mesh_cfg, count = MESHES[name]
        mesh = sharding.make_mesh(mesh_cfg, jax.devices()[:count])
        found = run(mesh, name in ONLY_EVALUATED)
        arrays = {leaf: np.asarray(value) for leaf, value in trees.named_leaves(found)}
        np.savez(os.path.join(folder, name), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
