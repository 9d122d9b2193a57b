"""`Model.apply` within functions of one's own that JAX transforms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
from dials_jax.models import transformer
from dials_jax.skipping.policies import Random
from tests.conftest import MASK

TOKENS = np.array([[5, 9, 11, MASK], [4, 4, MASK, MASK]], np.int32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"valid": np.array([[True] * 4, [False, *[True] * 3]])}, {"policy": Random(1)}],
    ids=str,
)
def test_in_a_jit_it_is_the_same_forward_pass(lively, settings):
    settings |= {"key": jax.random.key(3)}
    expected = lively.apply(TOKENS, **settings)
    found = jax.jit(lambda tokens: lively.apply(tokens, **settings))(TOKENS)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_array_equal(found.gates, expected.gates)


def test_gradients_reach_the_parameters_of_a_model_made_there(lively):
    cfg = lively.config

    def loss(logits):
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    def plain(params):
        return loss(
            transformer.predict_logits(
                cfg, params, transformer.run_layers(cfg, params, jnp.array(TOKENS), None).h
            )
        )

    grads = jax.grad(lambda p: loss(dj.Model(cfg, p, lively.mesh).apply(TOKENS).logits))
    expected = jax.jit(jax.grad(plain))(lively.params)
    for found in (grads(lively.params), jax.jit(grads)(lively.params)):
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(jax.device_get(expected)))


def test_sequences_may_be_mapped_one_by_one(lively):
    one_by_one = jax.vmap(lambda row: lively.apply(row[None]).logits[0])(TOKENS)
    np.testing.assert_allclose(one_by_one, lively.apply(TOKENS).logits, atol=1e-5)


def test_on_a_mesh_of_other_axes_it_is_refused_in_one_line(lively):
    mesh = jax.make_mesh((1,), ("own",))
    with jax.set_mesh(mesh), pytest.raises(InputError, match="axes own, not data, fsdp, tensor"):
        jax.jit(lambda tokens: lively.apply(tokens).logits)(TOKENS)
    for given in (mesh, jax.make_mesh((1, 1), ("data", "tensor"))):
        with pytest.raises(InputError, match=r"give sizes, as dj.MeshConfig\(data=2, tensor=2\)"):
            dj.Model(lively.config, lively.params, given)


def test_a_mesh_is_given_by_its_sizes(lively, untyped):
    model = dj.Model(lively.config, lively.params, dj.MeshConfig(fsdp=1))
    assert model.mesh == lively.mesh
    with pytest.raises(InputError, match="is no mesh; give sizes"):
        dj.Model(lively.config, lively.params, {"data": 1})


def test_a_batch_invariant_model_is_refused_there(lively):
    model = dj.Model(lively.config, lively.params, lively.mesh, batch_invariant=True)
    with pytest.raises(InputError, match="in programs of its own only; call it outside"):
        jax.jit(lambda tokens: model.apply(tokens).logits)(TOKENS)
