"""What the figures of a representation study show, and its page."""

import dataclasses

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.reporting.publish import Report, publish
from dials_jax.studies import neighbour_plots, representation_page
from dials_jax.studies import representation_plots as plots
from dials_jax.studies.claims import Claim, Evidence
from tests.reporting.pages import HOSTILE, read_page
from tests.studies.profiles import random_profile

DIFFUSION = random_profile("one", steps=5, layers=4, prompt=2, answer=10)
CAUSAL = random_profile("two", layers=3, prompt=2, answer=10, family="causal", seed=1)
BOTH = {"one": DIFFUSION, "two": CAUSAL}


@pytest.mark.parametrize(
    "steps, decoded, group", [(10, 0, 0), (10, 4, 4), (10, 10, 9), (10, None, 9), (5, 4, 2)]
)
def test_the_group_of_steps_is_where_so_many_tokens_are_decoded(steps, decoded, group):
    assert plots.group_at(random_profile(steps=steps, answer=10), decoded) == group


def test_a_causal_model_has_no_later_positions_yet():
    found = plots.at_decoded(CAUSAL.layer_cosine.mean, CAUSAL, 4)
    assert np.isnan(found[:, 6:]).all() and np.isfinite(found[:, :6]).all()
    assert np.isfinite(CAUSAL.layer_cosine.mean).all()  # the profile itself stays
    assert np.isfinite(plots.at_decoded(CAUSAL.layer_cosine.mean, CAUSAL, None)).all()


def test_depth_curves_are_means_of_answers(drawn, tmp_path):
    plots.depth_curves(BOTH, tmp_path / "d.png")
    steps, sequences = drawn[0].axes
    one, two = (line.get_ydata() for line in steps.lines)
    np.testing.assert_allclose(one, DIFFUSION.layer_cosine.mean[..., 2:].mean((0, 2)))
    np.testing.assert_allclose(two, CAUSAL.layer_cosine.mean[0, :, 2:].mean(-1))
    assert len({line.get_linestyle() for line in steps.lines}) == 2  # told apart in grey, too
    np.testing.assert_allclose(sequences.lines[0].get_ydata(), DIFFUSION.sequence_layer.mean(0))
    low, high = sequences.collections[0].get_paths()[0].get_extents().intervaly
    assert low < DIFFUSION.sequence_layer.mean(0).min() and high < 2.5


def test_heat_maps_of_all_models_share_a_scale(drawn, tmp_path):
    plots.layer_heatmaps(BOTH, tmp_path / "h.png", 4)
    images = [ax.collections[0] for ax in drawn[0].axes[:2]]
    assert images[0].get_clim() == images[1].get_clim()
    np.testing.assert_array_equal(images[0].get_array(), DIFFUSION.layer_cosine.mean[2])
    assert np.ma.getmaskarray(images[1].get_array())[:, 6:].all()
    assert drawn[0].axes[0].get_title() == "one: step 2 of 5, from 0"


def test_steps_are_those_of_diffusion_models(drawn, tmp_path):
    plots.step_heatmaps(BOTH, tmp_path / "s.png")
    (image,) = drawn[0].axes[0].collections
    answer = DIFFUSION.layer_cosine.mean[..., 2:].mean(-1)
    np.testing.assert_allclose(image.get_array(), answer.T)
    with pytest.raises(InputError, match="no model has what the figure shows"):
        plots.step_heatmaps({"two": CAUSAL}, tmp_path / "s.png")


def test_sinks_are_named_where_they_are_largest(drawn, tmp_path):
    norm = dataclasses.replace(
        DIFFUSION.norm, mean=np.ones_like(DIFFUSION.norm.mean), m2=0 * DIFFUSION.norm.m2
    )
    largest, sinks = np.ones((5, 12)), np.zeros((5, 12), int)
    largest[3, 7], sinks[2:4, 7] = 9.5, 4
    sunk = dataclasses.replace(DIFFUSION, norm=norm, largest_norm=largest, sinks=sinks)
    assert plots.named_sinks(sunk) == [(3, 7)]
    plots.norm_curves({"one": sunk}, tmp_path / "n.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["5: 9.5x"]
    assert "position 5, 9.5 times" in representation_page._norm_sentence({"one": sunk})


def test_change_is_drawn_by_distance(drawn, tmp_path):
    plots.change_curves(BOTH, tmp_path / "c.png")
    (ax,) = drawn[0].axes
    assert [line.get_label() for line in ax.lines[:2]] == ["0", "3"]
    assert ax.lines[0].get_xdata().tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_neighbours_are_those_of_the_named_layers(drawn, tmp_path):
    neighbour_plots.neighbour_rows(BOTH, tmp_path / "r.png", 4)
    axes = np.reshape(drawn[0].axes, (5, 2))
    assert axes[-1, 0].get_title() == "one, after layer 3"
    middle, end = axes[-1, 0].lines
    np.testing.assert_array_equal(middle.get_ydata(), DIFFUSION.token_cosine.mean[2, 4])
    np.testing.assert_array_equal(end.get_ydata(), DIFFUSION.token_cosine.mean[-1, 4])


def test_quarters_hold_every_layer_once():
    quarters = neighbour_plots.quarter_states(10)
    assert np.concatenate(quarters).tolist() == list(range(1, 11)) and len(quarters) == 4


# ----------------------------------------------------------------------------------------- page


def test_what_was_not_tested_is_said():
    partly = dataclasses.replace(claim((1, 2)), untested="the rest")
    assert representation_page.claim_sentence(partly).endswith("above 0. Not tested: the rest.")


def claim(*intervals):
    numbers = [
        Evidence(what=f"n{i}", value=0.0, low=float(x), high=float(y))
        for i, (x, y) in enumerate(intervals)
    ]
    return Claim(title="t", sentence="s", needs="a model", evidence=tuple(numbers))


@pytest.mark.parametrize(
    "intervals, said",
    [
        ([], "Not tested: that takes a model."),
        ([(1, 2)], "Supported: the interval lies above 0."),
        ([(1, 2), (3, 4)], "Supported: both intervals lie above 0."),
        ([(1, 2), (-2, -1), (-1, 1)], "Not supported: these lie below 0: n1."),
        ([(1, 2), (-1, 1)], "Undecided: the intervals of these do not leave out 0: n1."),
        ([(np.nan, np.nan)], "Undecided: the intervals of these do not leave out 0: n0."),
    ],
)
def test_sentences_follow_from_the_intervals(intervals, said):
    assert representation_page.claim_sentence(claim(*intervals)) == said


def test_the_page_has_a_chapter_per_claim_and_all_figures(tmp_path):
    facts = dataclasses.replace(DIFFUSION.facts, label=HOSTILE)
    profiles = {HOSTILE: dataclasses.replace(DIFFUSION, facts=facts), "two": CAUSAL}
    table = representation_page.profile_table(profiles)
    report = Report(
        title=HOSTILE, results={}, columns=(), rows=(), tables={"Profiles": table}, legend=(),
        figures=(), text="", above={}, below={},
        chapters=representation_page.representation_chapters(profiles, num_decoded=4),
    )  # fmt: skip
    publish(report, tmp_path)
    page = read_page(tmp_path)
    assert page.visible.count("Claim: ") == 3 and HOSTILE in page.visible
    assert "Not tested: that takes an adapted" in page.visible
    names = [figure.name for chapter in report.chapters for figure in chapter.figures]
    assert len(page.images) == len(set(names)) == len(names) == 13
    assert {f"{name}.{end}" for name in names for end in ("png", "pdf")} == {
        path.name for path in (tmp_path / "plots").iterdir()
    }
