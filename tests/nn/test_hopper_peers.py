"""When GPUs add their parts of a product by reading each other's memory; that they add right is
said by `tests/test_mesh.py`, with another sum, and by `benchmarks.peer_sums` and `benchmarks.mesh`
on GPUs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dials_jax import sharding
from dials_jax.compiling import batch_invariant
from dials_jax.nn import attention, linear, mlp
from dials_jax.nn.kernels import hopper_peers, per_device
from dials_jax.nn.kernels.hopper_peers import PEER_ACCESS, PEER_ATOMICS, split_refusal
from tests.conftest import small_config

READS_PEERS = hopper_peers.reads_peers


@pytest.fixture(autouse=True)
def two_gpus_here(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(hopper_peers, "reads_peers", lambda: True)
    flags = hopper_peers._flags.set(jnp.zeros(hopper_peers.NUM_FLAGS, jnp.int32))
    yield
    hopper_peers._flags.reset(flags)


def refusal(
    sizes=(1, 1, 2), x=(2, 8, 64), weight=(64, 128), axes="...D,DF->...F", dtype="float32",
    added_to=None,
):  # fmt: skip
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        return split_refusal(added_to, jnp.ones(x, dtype), jnp.ones(weight, dtype), axes, None)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, None),
        ({"dtype": "bfloat16"}, None),
        ({"x": (2, 8, 8, 4), "weight": (8, 4, 128), "axes": "BTNH,NHD->BTD"}, None),
        ({"sizes": (1, 1, 1)}, "two GPUs"),
        ({"sizes": (1, 1, 4)}, "two GPUs"),
        ({"sizes": (2, 1, 1)}, "on `tensor`"),  # batch shards take their own branches
        ({"sizes": (1, 2, 1)}, "on `tensor`"),
        ({"x": (2, 8, 15), "weight": (15, 128)}, "does not split 15"),
        ({"x": (2, 7, 64)}, "multiples of 2048"),
        ({"x": (0, 8, 64)}, "multiples of 2048"),
        ({"dtype": "float16"}, "bfloat16 or float32"),
        ({"axes": "BTD,VD->BTV", "weight": (128, 64)}, "rows by a weight"),
        ({"added_to": jnp.ones((2, 8, 128))}, None),
        ({"added_to": jnp.ones((2, 8, 128), "bfloat16")}, "to float32 of the product's"),
        ({"added_to": jnp.ones((1, 8, 128))}, "the product's shape"),
    ],
)
def test_what_it_takes(given, expected):
    why = refusal(**given)
    assert expected in why if expected else why is None


def test_two_of_several_gpus_are_not_all(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert "all of one process" in refusal()


def test_without_a_mesh():
    x, weight = jnp.ones((2, 8, 64)), jnp.ones((64, 128))
    assert "two GPUs" in split_refusal(None, x, weight, "...D,DF->...F", None)


@pytest.mark.parametrize(
    "names, made",
    [("", True), ("xla", False), ("hopper_peers", True), ("hopper_peers,xla", True),
     ("cudnn,xla", False), ("-hopper_peers", False), ("-cudnn", True)],
)  # fmt: skip
def test_xlas_kernels_need_no_flags(names, made, monkeypatch):
    monkeypatch.setenv("DIALS_KERNELS", names)
    monkeypatch.setattr(per_device, "on_hopper", lambda: True)
    monkeypatch.setattr(hopper_peers, "on_each_device", lambda make: make)
    mesh = AbstractMesh((1, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        assert hopper_peers.with_flags(hopper_peers._flags.get)() == (
            hopper_peers.make_flags if made else None
        )


def test_outside_of_a_stack():
    hopper_peers._flags.set(None)
    assert "stack of layers" in refusal()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        (jax, "process_count", "one process"),
        (hopper_peers, "reads_peers", "each other's memory"),
    ],
    ids=["processes", "memory"],
)
def test_gpus_that_cannot_read_each_other(name, value, expected, monkeypatch):
    monkeypatch.setattr(name, value, lambda: 2 if name is jax else False)
    assert expected in refusal()


def test_inside_a_shard_map_and_in_the_batch_invariant_mode():
    mesh = AbstractMesh((1, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    args = None, jnp.ones((2, 8, 64)), jnp.ones((64, 128)), "...D,DF->...F", None
    found = []

    def inside(x, weight):
        found.append(split_refusal(None, x, weight, *args[3:]))
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        split = jax.shard_map(inside, in_specs=P(), out_specs=P(), axis_names={"data", "fsdp"})
        jax.eval_shape(split, *args[1:3])
        assert "two GPUs" in found[0]
        with batch_invariant(True):
            [ours, *_] = linear.SPLIT_PRODUCT
            assert "may depend on the batch" in ours.refusal(*args)


@pytest.fixture
def two_gpus(monkeypatch):
    """Sets what a process with two GPUs finds: an allocator, the driver, and JAX's options."""

    def make(allocator="", reachable=(PEER_ACCESS, PEER_ATOMICS), waits=True, status=0):
        def attribute_of(yes, attribute, gpu, peer):
            yes._obj.value = attribute in reachable and {gpu, peer} == {0, 1}
            return status

        gpus = [SimpleNamespace(local_hardware_id=number) for number in range(2)]
        driver = SimpleNamespace(cuDeviceGetP2PAttribute=attribute_of)
        fields = {"skip_device_barrier": None} if waits else {}
        params = SimpleNamespace(__dataclass_fields__=fields)
        monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", allocator)
        monkeypatch.setattr(jax, "local_devices", lambda: gpus)
        monkeypatch.setattr(hopper_peers.ctypes, "CDLL", lambda name: driver)
        monkeypatch.setattr(mosaic_gpu, "CompilerParams", params)

    return make


@pytest.mark.parametrize(
    "how, expected",
    [
        ({}, True),
        ({"allocator": "bfc"}, True),
        ({"allocator": "platform"}, False),
        ({"reachable": [PEER_ATOMICS]}, False),
        ({"reachable": [PEER_ACCESS]}, False),
        ({"status": 1}, False),
        ({"waits": False}, False),  # JAX before 0.11.2
    ],
)
def test_whose_memory_is_read(how, expected, two_gpus):
    two_gpus(**how)
    assert READS_PEERS.__wrapped__() == expected


def test_both_ways_out_of_a_block_are_such_products(monkeypatch):
    """And no other product is."""
    taken = []

    def record(implementations, *args):
        split = implementations is linear.SPLIT_PRODUCT
        x, kernel, *rest = args[1:] if split else args
        taken.append((split, kernel.shape))
        return linear.xla_product(x, kernel, *rest)

    monkeypatch.setattr(linear, "dispatch", record)
    cfg = small_config()
    heads = attention.Attention(cfg, nnx.Rngs(0))
    q, _ = heads.rotated(jnp.ones((2, 8, cfg.d_model)), None)
    heads.out(q)
    hidden = mlp.MLP(cfg, nnx.Rngs(0))
    out = hidden(jnp.ones((2, 8, cfg.d_model)))
    assert np.isfinite(out).all()
    assert {shape for split, shape in taken if split} == {heads.o.shape, hidden.down.shape}
    assert len([split for split, _ in taken if split]) == 2
