#!/bin/bash
# jax 0.10.2: a custom_partitioning call inside a shard_map that leaves an axis of the mesh automatic
# does not compile where that axis has size 1. With size 2 it does, and gives the right values. So the
# same program fails on a mesh (4, 1) and runs on (2, 2). cuDNN's attention, from
# jax.nn.dot_product_attention, is such a call.
# Expected: an automatic axis of size 1 changes nothing.
# Seen: size 1 raises JaxRuntimeError, "custom_partitioner"; size 2 runs.
# (Way round: a second shard_map inside, over the axes that are left.)
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$W/run.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


@custom_partitioning
def double(x):
    return 2 * x


double.def_partition(
    partition=lambda mesh, args, result: (
        mesh, lambda x: 2 * x, args[0].sharding, (args[0].sharding,)
    ),
    infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
    sharding_rule="i j -> i j",
)


def outcome(*sizes):
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "tensor"))
    with jax.set_mesh(mesh):
        fn = jax.shard_map(
            double, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False
        )
        try:
            return "runs" if (jax.jit(fn)(jnp.ones((8, 4))) == 2).all() else "wrong"
        except jax.errors.JaxRuntimeError as error:
            return "raises, custom_partitioner" if "custom_partitioner" in str(error) else str(error)


found = {sizes: outcome(*sizes) for sizes in ((4, 1), (2, 2))}
print(found)
sys.exit(found != {(4, 1): "raises, custom_partitioner", (2, 2): "runs"})
PY
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$W/venv/bin/python" "$W/run.py" 2>/dev/null
