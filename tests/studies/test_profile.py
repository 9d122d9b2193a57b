"""Profiles: moments that merge into those of all values at once, and their files."""

import dataclasses

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.studies.profile import Moments, load_profile, load_profiles, save_profile
from tests.studies.profiles import random_profile

PARTS = [field.name for field in dataclasses.fields(Moments)]


@pytest.fixture
def values():
    """Eleven values per entry, around a mean that is large beside their spread."""
    return 1000 + np.random.default_rng(0).normal(size=(11, 2, 3))


def assert_same(found, expected):
    for name in PARTS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)


def test_moments_are_those_of_numpy(values):
    found = Moments.of(values, axis=0)
    np.testing.assert_allclose(found.mean, values.mean(0))
    np.testing.assert_allclose(found.std, values.std(0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(found.standard_error, values.std(0, ddof=1) / np.sqrt(11), rtol=1e-9)


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_parts_merge_into_all_at_once(values, cut):
    parts = Moments.of(values[:cut], axis=0), Moments.of(values[cut:], axis=0)
    assert_same(parts[0].merge(parts[1]), Moments.of(values, axis=0))


def test_pooling_is_that_of_all_values(values):
    assert_same(Moments.of(values, axis=0).pooled((0, 1)), Moments.of(values, axis=(0, 1, 2)))


def test_values_left_out_do_not_count(values):
    where = np.ones(values.shape, bool)
    where[3:, 0, 0] = where[:, 1, 2] = False
    found = Moments.of(values, axis=0, where=where)
    assert found.count[0, 0] == 3 and np.isclose(found.mean[0, 0], values[:3, 0, 0].mean())
    assert found.count[1, 2] == 0 and np.isnan(found.mean[1, 2]) and np.isnan(found.std[1, 2])
    assert np.isfinite(found.pooled((0, 1)).mean)  # an entry without values adds nothing


def test_an_accumulators_empty_entries_have_no_mean():
    found = Moments.from_sums(np.array([[2.0], [0.0]]), np.ones((2, 3)), np.zeros((2, 3)))
    assert found.count.shape == (2, 3)
    assert (found.mean[0] == 1).all() and np.isnan(found.mean[1]).all()


@pytest.mark.parametrize("family", ["diffusion", "causal"])
def test_a_stored_profile_is_the_same(tmp_path, family):
    profile = random_profile("Qwen2.5 7B/base", family=family)
    path = save_profile(profile, tmp_path)
    assert path.parent == tmp_path / "profiles"
    stored = load_profiles(tmp_path, [profile.facts.label])[profile.facts.label]
    for field in dataclasses.fields(profile):
        one, two = getattr(profile, field.name), getattr(stored, field.name)
        whole = isinstance(one, Moments)
        parts = [(getattr(one, n), getattr(two, n)) for n in PARTS] if whole else [(one, two)]
        for left, right in parts:  # to the last bit: a study goes on from it
            np.testing.assert_array_equal(left, right)


def test_merged_profiles_hold_the_sequences_of_both():
    one, two = random_profile(seed=1), random_profile(seed=2, sequences=2)
    both = one.merge(two)
    assert both.num_sequences == 5 and both.seconds == 5.0
    np.testing.assert_array_equal(both.prompt_layer[3:], two.prompt_layer)
    np.testing.assert_array_equal(both.sinks, one.sinks + two.sinks)
    np.testing.assert_array_equal(both.largest_norm, np.maximum(one.largest_norm, two.largest_norm))
    mean = (3 * one.norm.mean + 2 * two.norm.mean) / 5
    np.testing.assert_allclose(both.norm.mean, mean, rtol=1e-12)


def test_positions_and_distances_count_from_zero():
    profile = random_profile(prompt=2, answer=3)
    assert profile.positions.tolist() == [-2, -1, 0, 1, 2]
    assert profile.distances.tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_profiles_of_two_models_do_not_merge():
    with pytest.raises(InputError, match="'a' and 'b' are of other models"):
        random_profile("a").merge(random_profile("b"))


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tiny.npz is missing; run the representation study"):
        load_profiles(tmp_path, ["tiny"])
    path = save_profile(random_profile(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"tiny.npz is damaged .*; delete it"):
        load_profile(path)
    np.savez(path, facts=np.array("{}"), sequence_token=np.ones((2, 3)))
    with pytest.raises(InputError, match=r"tiny.npz is of an earlier version, .*; delete it"):
        load_profile(path)
    np.savez(path, facts=np.array("{}"))
    with pytest.raises(InputError, match=r"tiny.npz is damaged .*; delete it"):
        load_profile(path)
