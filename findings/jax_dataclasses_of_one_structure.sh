#!/bin/bash
# jax 0.10.2, CPU: two classes registered with `jax.tree_util.register_dataclass` that have as many
# fields, and equal static ones, have equal tree structures, though the hashes of the structures
# differ. A jitted function that is given first one and then the other therefore runs the program of
# the first for the second now and then: no error, wrong numbers. `flax.struct.dataclass` of flax
# 0.12.8 registers its classes so, too. With jax 0.11.1 to 0.12.0 the structures are still
# equal; no wrong program was seen there.
# Expected: structures of different classes differ, as they do for `register_pytree_node`.
# Seen: equal structures with other hashes, and some of 300 classes get another one's program.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat > "$W/run.py" <<'PY'
from dataclasses import dataclass

import flax
import jax


def make(number):
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Scale:
        x: float
        by = number

    return Scale


@flax.struct.dataclass
class Metres:
    x: float


@flax.struct.dataclass
class Feet:
    x: float


first, second = (jax.tree.structure(make(n)(1.0)) for n in (1, 2))
print("jax: equal", first == second, "hashes equal", hash(first) == hash(second))
print("flax: equal", jax.tree.structure(Metres(1.0)) == jax.tree.structure(Feet(1.0)))
scaled = jax.jit(lambda s: s.x * s.by)
wrong = sum(scaled(make(n)(1.0)).item() != n for n in range(300))
print("programs of another class:", "some" if wrong else "none", wrong)
PY
"$W/venv/bin/python" "$W/run.py" 2>/dev/null | tee "$W/out.txt"
grep -q "^jax: equal True hashes equal False" "$W/out.txt"
grep -q "^flax: equal True" "$W/out.txt"
grep -q "class: some" "$W/out.txt"
