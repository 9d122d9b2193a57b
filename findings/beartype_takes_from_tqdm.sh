#!/bin/bash
# beartype 0.23.1: checking a returned tqdm against Iterable[int] takes the first element out of the
# iterator that it shows.
# Expected: [0, 1, 2]. A check changes nothing; beartype leaves plain iterators alone.
# Seen: [1, 2]. tqdm has __len__ and __contains__, so it counts as a collection that can be read twice.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q beartype==0.23.1 tqdm==4.70.1
cat > "$W/run.py" <<'PY'
import sys
from collections.abc import Iterable

from beartype import beartype
from tqdm import tqdm


@beartype
def shown(values: int) -> Iterable[int]:
    return tqdm(iter(range(values)), total=values, disable=True)


found = list(shown(3))
print(found)
sys.exit(found != [1, 2])
PY
"$W/venv/bin/python" "$W/run.py"
