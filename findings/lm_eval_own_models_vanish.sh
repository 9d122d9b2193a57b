#!/bin/bash
# lm_eval 0.4.13: the harness registers its own models only while no other model is registered.
# Expected: after `register_model("mine")`, "dummy" (and "hf") are still known.
# Seen: "no model for this name found! Supported model names: mine". Importing lm_eval.models before
# registering helps.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q lm_eval==0.4.13
cat > "$W/run.py" <<'PY'
import sys

from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, register_model


@register_model("mine")
class Mine(LM):
    pass


try:
    get_model("dummy")
except ValueError as error:
    print(error)
    sys.exit("Supported model names: mine" not in str(error))
sys.exit(1)
PY
"$W/venv/bin/python" "$W/run.py" 2>/dev/null
