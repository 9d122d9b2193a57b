"""The benchmark of sums over GPUs: what it refuses, and that it notices another result."""

import jax.numpy as jnp
import pytest

from benchmarks import peer_sums as module

SMALL = ["--model", "tiny", "--rows", "32", "--passes", "1", "--mlps", "1", "--repeats", "1"]


def test_one_cpu_is_refused_in_one_line(capsys):
    assert module.main(SMALL) == 2
    assert "Hopper" in capsys.readouterr().err


def test_a_sum_is_itself(monkeypatch, capsys):
    """The programs themselves, with XLA's sums for both."""
    monkeypatch.setattr(module, "WAYS", ("xla", "xla"))
    assert module.main(SMALL) == 0
    assert "0.0%" in capsys.readouterr().out


@pytest.mark.parametrize("wrong, status", [(0, 0), (0.01, 1)])
def test_another_result_is_noticed(wrong, status, monkeypatch, capsys):
    def compile_way(way, *settings):
        return lambda x, weights: x + jnp.where(way == "xla", 0, wrong).astype(x.dtype)

    monkeypatch.setattr(module, "pick", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "compile_way", compile_way)
    assert module.main(SMALL) == status
    assert "%" in capsys.readouterr().out
