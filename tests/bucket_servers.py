"""Real servers of buckets on this machine, for gs:// and for s3://."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from unittest import mock

NAME = "things"  # of the bucket in each
SERVERS = {
    "gs": ("gcp_storage_emulator", "start", "--in-memory", "--host", "localhost", "--port"),
    "s3": ("moto.server", "--port"),
}
ADDRESSES = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}  # variables of their packages
NOTHING_ELSE_IS_ASKED = {
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # Google's own servers would be
    "NO_GCE_CHECK": "true",  # and those that tell a machine in its cloud who it is
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def bucket_servers(schemes: Iterable[str] = tuple(SERVERS)) -> Iterator[None]:
    """A server for each scheme, with an empty bucket, known to this process and those it starts."""
    with contextlib.ExitStack() as stack:
        ports = {scheme: free_port() for scheme in schemes}
        for scheme, port in ports.items():
            command = [sys.executable, "-m", *SERVERS[scheme], str(port)]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            server = subprocess.Popen(command, **quiet)
            stack.callback(server.wait)
            stack.callback(server.kill)
        known = {ADDRESSES[scheme]: f"http://localhost:{port}" for scheme, port in ports.items()}
        stack.enter_context(mock.patch.dict(os.environ, NOTHING_ELSE_IS_ASKED | known))
        for scheme, port in ports.items():
            wait_for(port)
            make_bucket(scheme, port)
        yield


def make_bucket(scheme: str, port: int) -> None:
    """Without fsspec, which starts a thread: who counts faults is forked."""
    at = f"http://localhost:{port}"
    json = {"Content-Type": "application/json"}
    content = b'{"name": "%s"}' % NAME.encode()
    requests = {
        "gs": urllib.request.Request(f"{at}/storage/v1/b?project=none", content, json),
        "s3": urllib.request.Request(f"{at}/{NAME}", method="PUT"),
    }
    urllib.request.urlopen(requests[scheme]).close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            return socket.create_connection(("localhost", port), 1).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"no server listens at {port}")
