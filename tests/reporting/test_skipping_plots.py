import numpy as np

from dials_jax.reporting import skipping_plots
from dials_jax.reporting.skipping_plots import Kept


def test_retention_is_in_per_cent_and_points_name_the_layers_skipped(drawn, tmp_path):
    kept = Kept((0, 2), (0, 0.25), (1, 0.9), (1, 0.8), (1, 0.95))
    skipping_plots.retention_curves({"a": kept, "b": kept}, tmp_path / "r.png", "GSM8K")
    ax = drawn[0].axes[0]
    line, _, (bars,) = ax.containers[0].lines
    assert line.get_xydata().tolist() == [[0, 100], [25, 90]]
    assert np.allclose([bar[:, 1] for bar in bars.get_segments()], [[100, 100], [80, 95]])
    assert [text.get_text() for text in ax.texts] == ["2", "2"]


def test_a_grid_shows_what_ran(drawn, tmp_path):
    executed = np.array([[True, False, True], [True, True, False]])
    skipping_plots.skipping_grid(executed, tmp_path / "g.png")
    (cells,) = drawn[0].axes[0].collections
    assert cells.get_array().tolist() == executed.T.tolist()


def test_choices_have_a_row_per_model_and_a_column_per_rule(drawn, tmp_path):
    own = {"allowed": np.array([0.5, 1.0]), "not": np.array([0.0, 1.0])}
    skipping_plots.choice_bars({"a": own, "b": own}, tmp_path / "c.png")
    axes = drawn[0].axes
    assert [ax.get_title() for ax in axes] == ["a: allowed", "a: not", "b: allowed", "b: not"]
    assert [bar.get_height() for bar in axes[0].patches] == [50, 100]
