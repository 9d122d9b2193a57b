import itertools
import re
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dials_jax import sharding, trees
from dials_jax.config import MeshConfig
from dials_jax.errors import InputError
from dials_jax.models import families
from tests.conftest import in_eight_bits, init_params, random_routers, small_config

KV_AXES = {"axis": -4, "heads": -2}  # keys and values: [..., B, S, K, H]
AUTO = (AxisType.Auto,) * 3  # as a mesh of devices has them
MESH = AbstractMesh((2, 4, 2), sharding.AXES, axis_types=AUTO)  # sizes without devices


CONFIGS = {
    "llada": small_config(qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True),
    "mdlm": families.mdlm_small(2, 32, 64, 63, 1, 0),
    "gpt2": families.gpt2_small(2, 32, 64, 1, 0),
}


def named_parameters(family="llada", unrolled=False, eight_bits=False):
    cfg = CONFIGS[family]
    params = init_params(cfg)
    if eight_bits:
        params = in_eight_bits(params, "int8")
    if unrolled:
        params = {**params, "layers": trees.unstack(params["layers"])}
    yield from trees.named_leaves({**params, "routers": random_routers(cfg)})


@pytest.mark.parametrize("unrolled", [False, True])
def test_every_parameter_matches_exactly_one_rule(unrolled):
    used = set()
    for family, eight_bits in itertools.product(CONFIGS, (False, True)):
        for name, _ in named_parameters(family, unrolled, eight_bits):
            matches = [pattern for pattern, _ in sharding.RULES if re.fullmatch(pattern, name)]
            assert len(matches) == 1, name
            used.update(matches)
    assert used == {pattern for pattern, _ in sharding.RULES}  # no rule is dead


@pytest.mark.parametrize("family", CONFIGS)
def test_layouts_are_split_alike(family):
    stacked = dict(named_parameters(family))
    for name, x in named_parameters(family, unrolled=True):
        if name.startswith("layers/"):
            whole = "layers/" + name.split("/", 2)[2]
            spec = sharding.partition_spec(whole, stacked[whole].shape, MESH)
            assert spec == P(None, *sharding.partition_spec(name, x.shape, MESH))


def test_large_matrices_are_split_over_both_axes():
    def spec(name, *shape):
        return sharding.partition_spec(name, shape, MESH)

    assert spec("embed/table", 64, 32) == P("tensor", "fsdp")
    assert spec("layers/attention/q", 3, 32, 4, 8) == P(None, "fsdp", "tensor", None)
    assert spec("layers/2/attention/o", 4, 8, 32) == P("tensor", None, "fsdp")
    assert spec("layers/mlp/down", 3, 64, 32) == P(None, "tensor", "fsdp")
    assert spec("layers/mlp/down/values", 3, 32, 64) == P(None, "fsdp", "tensor")
    assert spec("layers/attention/q/values", 4, 8, 32) == P("tensor", None, "fsdp")
    assert spec("layers/attention/q/scales", 3, 4, 8) == P(None, "tensor", None)
    assert spec("head/kernel", 32, 64) == P("fsdp", "tensor")
    assert spec("head/kernel/values", 64, 32) == P("tensor", "fsdp")
    assert spec("head/kernel/scales", 64) == P("tensor")
    assert spec("layers/mlp_norm/scale", 3, 32) == P(None, None)


def test_an_axis_that_does_not_divide_is_not_split():
    assert sharding.partition_spec("layers/attention/k", (3, 32, 1, 8), MESH) == P(
        None, "fsdp", None, None
    )
    assert sharding.partition_spec("embed/table", (63, 30), MESH) == P(None, None)


@pytest.mark.parametrize("name", ["layers/attention/z", "heads/kernel", "layers/attention/q_norm"])
def test_an_unknown_parameter_is_an_error(name):
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        sharding.partition_spec(name, (4, 4), MESH)


def test_a_mesh_takes_all_devices():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.size == jax.device_count() == sharding.num_batch_shards(mesh)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 2, "fsdp": 2}, {"data": 1, "tensor": 64}])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match=r"does not fit 1 devices"):
        sharding.make_mesh(MeshConfig(**sizes), devices=jax.devices()[:1])


class Chip(NamedTuple):
    slice_index: int


@pytest.fixture
def two_slices(monkeypatch):
    """Eight chips, and the meshes that are asked for over them: within a slice, across slices."""
    asked = []

    def arrange(within, across, devices, allow_split_physical_axes):
        assert allow_split_physical_axes  # or most meshes would not fit a pod's network
        asked.append((within, across))
        return np.array(jax.devices()[:1]).reshape(1, 1, 1)

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", arrange)
    return [Chip(i // 4) for i in range(8)], asked


def test_rows_are_split_over_slices(two_slices):
    chips, asked = two_slices
    sharding.make_mesh(MeshConfig(data=4, fsdp=2), chips)
    sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), chips)
    assert asked == [([2, 2, 1], [2, 1, 1]), ([1, 2, 2], [2, 1, 1])]


def test_parameters_are_not_split_over_slices(two_slices):
    with pytest.raises(InputError, match="mesh data=1 does not divide over 2 slices"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=8), two_slices[0])


def test_optimiser_states_lie_beside_their_parameters():
    mesh = sharding.make_mesh()
    params = {"head": {"kernel": np.zeros((4, 6))}}
    state = {"mu": params, "count": np.zeros(()), "other": {"head": {"kernel": np.zeros(3)}}}
    found = sharding.state_shardings(state, params, mesh)
    assert found["mu"]["head"]["kernel"].spec == P("fsdp", "tensor")
    assert found["count"].spec == found["other"]["head"]["kernel"].spec == P()


def test_rows_are_constrained_only_under_a_mesh():
    x = jax.numpy.ones((4, 2))
    assert sharding.constrain_batch(x) is x


@pytest.mark.parametrize(
    "shape, axes, spec",
    [
        ((16, 5), {}, P(sharding.BATCH_AXES, None)),
        ((3, 16), {"axis": 1}, P(None, sharding.BATCH_AXES)),
        ((16, 5, 4, 8), KV_AXES, P(sharding.BATCH_AXES, None, "tensor", None)),
        ((3, 16, 5, 4, 8), KV_AXES, P(None, sharding.BATCH_AXES, None, "tensor", None)),  # stacked
        ((16, 5, 1, 8), KV_AXES, P(sharding.BATCH_AXES, None, None, None)),  # one head
    ],
)
def test_sequences_and_heads_of_a_state_are_split(shape, axes, spec):
    constrain = partial(sharding.constrain_batch, **axes)
    with jax.sharding.use_abstract_mesh(MESH):
        [step] = jax.make_jaxpr(constrain)(jax.ShapeDtypeStruct(shape, np.float32)).eqns
        few = jax.ShapeDtypeStruct((5,) * len(shape), np.float32)  # sequences that do not divide
        assert not jax.make_jaxpr(constrain)(few).eqns
    assert step.params["sharding"].spec == spec
    assert not jax.make_jaxpr(constrain)(few).eqns  # without a mesh: as it is
