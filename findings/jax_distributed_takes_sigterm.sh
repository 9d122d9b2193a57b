#!/bin/bash
# jax and jaxlib 0.10.2 (0.11.2 does the same), CPU: jax.distributed.initialize sets a handler of
# SIGTERM of its own, in C++, for jax.experimental.multihost_utils.reached_preemption_sync_point.
# A handler that the program had set before is never called afterwards, although signal.getsignal
# still returns it, and a process that had none no longer ends by SIGTERM. A program that saves its
# state on SIGTERM has to set its handler after joining the other processes, or to turn the
# configuration jax_enable_preemption_service off before.
# Expected: a handler of the program stays, or an error or the documentation of `initialize` says
# that it does not; signal.getsignal tells which one there is.
# Seen: the handler is called before joining; afterwards signal.getsignal returns it and it is not
# called; set once more, it is called. With the service off it is called all the time.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$W/run.py" <<'PY'
import os
import signal
import sys
import time

import jax

port, service = sys.argv[1], sys.argv[2] == "on"
called = []


def note(*_):
    called.append(1)


def is_handled():
    called.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(20):
        time.sleep(0.05)
    return bool(called)


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_preemption_service", service)
signal.signal(signal.SIGTERM, note)
before = is_handled()
jax.distributed.initialize(f"localhost:{port}", 1, 0)
print(before, signal.getsignal(signal.SIGTERM) is note, is_handled(), end=" ")
signal.signal(signal.SIGTERM, note)
print(is_handled())
PY
for service in on off; do
    port=$("$W/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
    timeout 60 "$W/venv/bin/python" "$W/run.py" "$port" $service 2>/dev/null > "$W/$service.txt"
done
"$W/venv/bin/python" -c 'import jax; print("jax", jax.__version__)'
echo "the service on (the default) and off: handled before; getsignal's afterwards; handled; set again"
cat "$W/on.txt" "$W/off.txt"
[ "$(cat "$W/on.txt")" = "True True False True" ] && [ "$(cat "$W/off.txt")" = "True True True True" ]
