import pytest


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, still open to inspection."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def record(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
