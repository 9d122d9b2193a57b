import pytest

from dials_jax.reporting import sweep_report


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing is slow; what is drawn is tested beside the plots."""
    monkeypatch.setattr(sweep_report, "_figures", lambda *args: [])
