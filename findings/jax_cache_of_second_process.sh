#!/bin/bash
# jax and jaxlib 0.10.2, CPU: a program over the devices of two processes has another key in the
# persistent compilation cache on each of them (the fingerprint of the topology of the same list of
# devices differs), and only process 0 writes. So the second process compiles everything again in
# every run, however often it ran before; jax 0.11.2 does the same.
# Expected: in a second run both processes find the program that the first run stored.
# Seen: process 0 hits, process 1 does not, and their fingerprints differ.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$W/run.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import _jax

number, port, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.distributed.initialize(f"localhost:{port}", 2, number)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
mesh = jax.make_mesh((2,), ("data",))
rows = np.ones((64, 64), np.float32)
split = NamedSharding(mesh, PartitionSpec("data"))
x = jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])
hits.clear()
total = jax.jit(lambda x: jnp.tanh(x @ jnp.ones((64, 64))).sum())(x)
topology = _jax.get_topology_for_devices(list(mesh.devices.flat))
print("hit" if any(hits) else "no hit", topology.fingerprint(), float(total))
PY
for run in 1 2; do
    port=$("$W/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
    for number in 0 1; do
        timeout 120 "$W/venv/bin/python" "$W/run.py" $number "$port" "$W/cache" > "$W/$number.txt" 2>/dev/null &
    done
    wait
done
for number in 0 1; do echo "process $number, second run: $(grep hit "$W/$number.txt")"; done
grep -q "^hit" "$W/0.txt" && grep -q "^no hit" "$W/1.txt"
! cmp -s <(grep hit "$W/0.txt" | cut -d' ' -f2-) <(grep hit "$W/1.txt" | cut -d' ' -f3-)
