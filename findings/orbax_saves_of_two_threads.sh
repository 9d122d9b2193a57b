#!/bin/bash
# orbax-checkpoint 0.12.8, jax 0.10.2, CPU: two threads of one process that save trees to folders of
# their own, with `ocp.save` of the v1 API, fail now and then: the temporary folder of one exists
# already, is gone, or is not empty. A file of a folder of its own is all that they share by name.
# Expected: saves to different folders do not know of each other, or the page of `save` says that
# it is for one thread.
# Seen: some of 40 saves raise FileExistsError, FileNotFoundError or OSError; what was saved is right.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat > "$W/run.py" <<'PY'
import collections
import pathlib
import sys
from concurrent import futures

import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

folder, threads = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with futures.ThreadPoolExecutor(threads) as pool:
    saves = [
        pool.submit(ocp.save, folder / str(i), {"x": jnp.full(4, i)}) for i in range(40)
    ]
errors = [save.exception() for save in saves]
kinds = collections.Counter(type(error).__name__ for error in errors if error)
wrong = sum(
    error is None and int(ocp.load(folder / str(i))["x"][0]) != i
    for i, error in enumerate(errors)
)
print(f"{threads} threads: {sum(kinds.values())} of 40 saves failed {dict(kinds)}, {wrong} are wrong")
sys.exit(not kinds if threads > 1 else bool(kinds))
PY
export JAX_PLATFORMS=cpu
"$W/venv/bin/python" "$W/run.py" "$W/one" 1 2> "$W/errors"
"$W/venv/bin/python" "$W/run.py" "$W/two" 2 2> "$W/errors"
