#!/bin/bash
# orbax-checkpoint 0.12.8, jax 0.10.2, CPU, two processes: an option of the v1 API,
# `multiprocessing.active_processes`, names the processes that take part in a save. All the same
# `ocp.save` compares the folder's name by a broadcast and a gather of jax.experimental.multihost_utils:
# programs on all devices of all processes, whichever are named. So processes that are not named are
# needed, too, and a thread that saves beside a training gives the devices these programs between
# the training's, at another place on each process.
# Expected: with named processes a save meets by JAX's coordinator alone, as its other steps do.
# Seen: one broadcast and one gather on each process, with and without names.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat > "$W/run.py" <<'PY'
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

folder, port, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{port}", 2, number)
mesh = jax.make_mesh((2,), ("data",))
x = jax.jit(
    lambda: jnp.arange(8.0),
    out_shardings=jax.NamedSharding(mesh, jax.P("data")),
)()
called = []


def noting(name):
    function = getattr(multihost_utils, name)

    def noted(*args, **kwargs):
        called.append(name)
        return function(*args, **kwargs)

    setattr(multihost_utils, name, noted)


for name in ("broadcast_one_to_all", "process_allgather", "sync_global_devices"):
    noting(name)
for named in (False, True):
    called.clear()
    context = ocp.Context()
    if named:
        context.multiprocessing.active_processes = {0, 1}
    with context:
        ocp.save(folder / str(named), {"x": x})
    print("named" if named else "default", {n: called.count(n) for n in sorted(set(called))})
PY
port=$("$W/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
for i in 0 1; do
    timeout -s KILL 120 "$W/venv/bin/python" "$W/run.py" "$W/saved" "$port" $i > "$W/$i.txt" 2> "$W/$i.err" &
    pids[i]=$!
done
wait "${pids[0]}" && wait "${pids[1]}" || { cat "$W"/*.err; exit 1; }
grep -h '{' "$W/0.txt" "$W/1.txt"
expected="named {'broadcast_one_to_all': 1, 'process_allgather': 1}"
[ "$(grep -cxF "$expected" "$W/0.txt")" = 1 ] && [ "$(grep -cxF "$expected" "$W/1.txt")" = 1 ]
