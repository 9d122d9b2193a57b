"""What a study shows: its tables, its figures and the page that holds them."""

import dataclasses

import pytest

from dials_jax.config import ProposeStudy
from dials_jax.studies import tables
from dials_jax.studies.from_studies import read_search
from dials_jax.studies.importance import importance_figures
from dials_jax.studies.placements import Placements
from tests.reporting.pages import read_page
from tests.studies.workdirs import results_of

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def proposed(searched, importance, run_once):
    settings = dict(search=str(searched), importance=str(importance[1]), budgets=(1, 3))
    return run_once(ProposeStudy(**settings, num_repeats=4))


def test_every_kind_of_study_leaves_a_page(compared, searched, importance, proposed):
    told = {
        compared: ("L2,H4,L2", "equal entropy", "first sample", "exact"),
        searched: [row["schedule"] for row in results_of(searched)["schedules"]],
        importance[1]: ("gap L", "kl H4,L4"),
        proposed: ("additive model", "Spearman", str(searched)),
    }
    for workdir, texts in told.items():
        page = read_page(workdir)
        assert all(text in page.visible for text in texts)


def drawn_names(figures, folder):
    """The names of the figures; each is where it should be, and explained."""
    for figure in figures:
        path = figure.draw(folder)
        assert path.parent == folder and path.read_bytes().startswith(PNG) and figure.caption
    return {figure.name for figure in figures}


@pytest.mark.parametrize("figure", ["schedules", "fractions"])
def test_given_schedules_are_drawn(figure, comparing, compared, tmp_path):
    rows = [tables.ScheduleRow(**row) for row in results_of(compared)["schedules"]]
    cfg = dataclasses.replace(comparing, figure=figure)
    found = tables.schedule_figure(rows, cfg, {"H": 2, "L": 1})
    assert drawn_names([found], tmp_path) == {figure}


def test_a_search_is_drawn(searching, searched, tmp_path):
    _, values = read_search(searched)
    light = Placements(searching.num_segments, searching.num_light).table
    figures = tables.segment_figures(light, values, searching.num_extremes)
    assert drawn_names(figures, tmp_path) == {"influence", "best_and_worst", "segment_frequencies"}


def test_importance_is_drawn(importance, tmp_path):
    cfg, workdir = importance
    figures = importance_figures(results_of(workdir), cfg)
    assert drawn_names(figures, tmp_path) == {"loss", "gap", "kl", "relative_kl"}
