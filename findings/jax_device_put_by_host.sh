#!/bin/bash
# jax 0.10.2 (0.11.2 and 0.12.0 alike), CPU, and 0.11.2 on GPUs: `jax.device_put` of an array to
# another sharding over the same devices, from whole on each to split or back, reads it to the host and
# sends it from there. A jitted identity with `out_shardings` does the same moves on the devices. On
# two H200s `device_put` took 8 ms for an array of 9 MB, and 16 of them six times as long as all that
# was computed before and after.
# Expected: the move stays on the devices, above all from whole to split, where each device already
# holds its part.
# Seen: `device_put` makes a NumPy array of the whole (in the profiler's trace: "np.asarray"), the
# jitted identity makes none; the values are equal.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
cat > "$W/run.py" <<'PY'
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((2,), ("tensor",))
whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("tensor"))


def trips(move, x):
    """How often the move makes a NumPy array of x on the host."""
    jax.block_until_ready(move(x))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            out = jax.block_until_ready(move(x))
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert np.array_equal(out, np.arange(1024.0))
    return sum(name.startswith("np.asarray") for name in names)


def fresh(sharding):
    return jax.jit(lambda: jnp.arange(1024.0), out_shardings=sharding)()


def identity(sharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


print(jax.__version__)
print("device_put, whole to split:", trips(lambda x: jax.device_put(x, split), fresh(whole)))
print("jit, whole to split:", trips(identity(split), fresh(whole)))
print("jit, split to whole:", trips(identity(whole), fresh(split)))
print("device_put, split to whole:", trips(lambda x: jax.device_put(x, whole), fresh(split)))
PY
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
"$W/venv/bin/python" "$W/run.py" 2>/dev/null | tee "$W/out.txt"
grep -q "^device_put, whole to split: [1-9]" "$W/out.txt"
grep -q "^device_put, split to whole: [1-9]" "$W/out.txt"
grep -q "^jit, whole to split: 0" "$W/out.txt"
grep -q "^jit, split to whole: 0" "$W/out.txt"
