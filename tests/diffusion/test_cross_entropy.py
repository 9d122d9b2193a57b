"""The chunked loss is the plain one: in value, in every gradient, for any chunk and weights."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.diffusion.cross_entropy import (
    HeadWeights,
    sequence_cross_entropy,
    weighted_cross_entropy,
)

B, T, D, V = 3, 7, 5, 11


def inputs(bias=True, share=0.5, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    h = jax.random.normal(keys[0], (B, T, D))
    head = HeadWeights(
        jax.random.normal(keys[1], (D, V)), jax.random.normal(keys[2], (V,)) if bias else None
    )
    targets = jax.random.randint(keys[3], (B, T), 0, V - 1)
    counted = jax.random.uniform(keys[4], (B, T)) < share
    return h, head, targets, counted * jax.random.uniform(keys[5], (B, T), minval=0.5, maxval=3.0)


def plain(h, head, targets, weights, never=None):
    logits = h @ head.kernel + (0 if head.bias is None else head.bias)
    if never is not None:
        logits = logits.at[..., never].set(-jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    nats = jnp.where(weights != 0, nats, 0.0)
    return jnp.sum(weights * nats), nats


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def with_gradients(fn, *args):
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(*args)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(
    "bias, share, never", [(True, 0.5, None), (False, 0.5, V - 1), (True, 1, 3)]
)
def test_it_is_the_plain_loss_in_value_and_gradients(chunk, bias, share, never):
    h, head, targets, weights = inputs(bias, share)
    targets = jnp.where(targets == never, 0, targets)

    def chunked(h, head):
        total, nats = weighted_cross_entropy(
            h, head, targets, weights, suppressed_id=never, chunk=chunk
        )
        return 2.0 * total, nats

    def direct(h, head):
        total, nats = plain(h, head, targets, weights, never)
        return 2.0 * total, nats

    assert_close(with_gradients(chunked, h, head), with_gradients(direct, h, head))


def test_without_weights_there_is_neither_loss_nor_gradient():
    h, head, targets, weights = inputs(share=0.0)

    def loss(h, head):
        return weighted_cross_entropy(h, head, targets, weights, chunk=4)

    (total, nats), gradients = with_gradients(loss, h, head)
    assert total == 0
    assert not any(np.any(x) for x in jax.tree.leaves((nats, gradients)))


def test_a_frozen_head_gets_no_gradient_and_the_states_get_the_same():
    h, head, targets, weights = inputs()

    def trained(h, head):
        return weighted_cross_entropy(h, head, targets, weights)

    def frozen(h, head):
        sums, nats = sequence_cross_entropy(h, head, targets, weights)
        return jnp.sum(sums), nats

    (total, nats), (both, of_head) = with_gradients(trained, h, head)
    (again, same), (alone, none) = with_gradients(frozen, h, head)
    np.testing.assert_allclose(total, again, rtol=1e-6)
    np.testing.assert_array_equal(nats, same)
    np.testing.assert_array_equal(both, alone)
    assert np.any(of_head.kernel) and not any(np.any(x) for x in jax.tree.leaves(none))


def test_each_sequences_sum_may_enter_a_loss_in_its_own_way():
    h, head, targets, weights = inputs()

    def chunked(h):
        return jnp.sum(jnp.sqrt(sequence_cross_entropy(h, head, targets, weights, chunk=4)[0]))

    def direct(h):
        return jnp.sum(jnp.sqrt(jnp.sum(weights * plain(h, head, targets, weights)[1], axis=1)))

    assert_close(jax.value_and_grad(chunked)(h), jax.value_and_grad(direct)(h))


def test_chunks_without_tokens_are_not_run():
    """Not-a-number states behind the last counted token reach nothing."""
    h, head, targets, weights = inputs()
    bad = jnp.where((weights == 0)[..., None], jnp.nan, h)

    def loss(h, head):
        return weighted_cross_entropy(h, head, targets, weights, chunk=1)

    assert_close(with_gradients(loss, bad, head), with_gradients(loss, h, head))


def test_no_array_has_all_tokens_and_all_of_the_vocabulary():
    h, head, targets, weights = inputs()

    def loss(h, head):
        return weighted_cross_entropy(h, head, targets, weights, chunk=4)

    text = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, head))
    assert "[4,128]" in text  # a chunk, and the vocabulary filled up
    assert not any(
        f"[{shape}]" in text for shape in (f"{B * T},{V}", f"{B * T},128", f"{B},{T},{V}")
    )


def test_half_precision_sums_in_float32():
    """Of many equal tokens: a sum in bfloat16 would stop growing at 256 of them."""
    num = 1024
    h = jnp.ones((1, num, 1), jnp.bfloat16)
    head = HeadWeights(jnp.zeros((1, 2)), jnp.zeros(2))
    targets, weights = jnp.zeros((1, num), jnp.int32), jnp.ones((1, num))

    def loss(h, head):
        return weighted_cross_entropy(h, head, targets, weights, chunk=64)

    (total, _), (_, gradient) = with_gradients(loss, h, head)
    np.testing.assert_allclose(total, num * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(gradient.kernel, [[-num / 2, num / 2]])
    np.testing.assert_allclose(gradient.bias, [-num / 2, num / 2])
    assert gradient.kernel.dtype == jnp.float32


ON_MESHES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dials_jax import sharding
from dials_jax.config import MeshConfig
from dials_jax.diffusion.cross_entropy import HeadWeights, weighted_cross_entropy

jax.config.update("jax_default_matmul_precision", "highest")
keys = jax.random.split(jax.random.key(0), 5)
head = HeadWeights(jax.random.normal(keys[0], (8, 22)), jax.random.normal(keys[1], (22,)))
share = np.linspace(0, 1, 8)[:, None] ** 2  # shards have different numbers of chunks, one has none
h = jax.random.normal(keys[2], (8, 16, 8))
targets = jax.random.randint(keys[3], (8, 16), 0, 21)
weights = 1.5 * (jax.random.uniform(keys[4], (8, 16)) < share)

def loss(h, head, targets, weights):
    return weighted_cross_entropy(h, head, targets, weights, suppressed_id=21, chunk=4)

step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
expected = step(h, head, targets, weights)
for mesh in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh(mesh)
    specs = HeadWeights(P("fsdp", "tensor"), P("tensor"))
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), head, specs)
    rows = jax.device_put((h, targets, weights), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = step(rows[0], placed, *rows[1:])
    assert found[1][0].sharding.spec[0] == ("data", "fsdp"), found[1][0].sharding
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
"""


def test_on_meshes_every_shard_sums_its_own_tokens():
    """In a process of its own, with 8 fake devices."""
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", ON_MESHES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
