import numpy as np

from dials_jax.evaluation.tally import NUM_BINS, LayerCounts


def test_counts_by_hand():
    # Two steps, two layers, two sequences. Shares 1 and 0.95 are of the last bin, 0.1 of the first.
    gates = np.array([[[1, 0], [1, 1]], [[0, 1], [1, 0]]], bool)
    counts = LayerCounts(2)
    counts.add(gates, np.array([[1.0, 0.95], [0.1, 0.0]]))
    np.testing.assert_array_equal(counts.calls, [1] + [0] * (NUM_BINS - 2) + [2])
    np.testing.assert_array_equal(counts.executed[-1], [1, 2])
    np.testing.assert_array_equal(
        counts.executed[0], [0, 1]
    )  # the sequence without masks is left out


def test_edges_belong_to_the_bin_below():
    counts = LayerCounts(1)
    shares = np.arange(1, 11, dtype=np.float32) / 10
    counts.add(np.ones((1, 10), bool), shares)
    np.testing.assert_array_equal(counts.calls, [1] * NUM_BINS)


def test_under_guidance_shares_repeat_for_the_second_half():
    counts = LayerCounts(1)
    counts.add(np.array([[True, False, False, True]]), np.array([0.05, 0.95]))
    assert counts.calls[0] == counts.calls[-1] == 2
    assert counts.executed[0, 0] == counts.executed[-1, 0] == 1


def test_additions_add_up():
    gates = np.random.default_rng(0).random((3, 4, 6)) < 0.5
    shares = np.random.default_rng(1).random((3, 6))
    whole, parts = LayerCounts(4), LayerCounts(4)
    whole.add(gates, shares)
    for half in (slice(0, 2), slice(2, 6)):
        parts.add(gates[..., half], shares[..., half])
    assert whole.to_dict() == parts.to_dict()
    assert whole.calls.sum() == 18
    np.testing.assert_array_equal(whole.executed.sum(axis=0), gates.sum(axis=(0, 2)))
