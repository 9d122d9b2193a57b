import numpy as np

from dials_jax.evaluation.execution import NUM_BINS, Execution


def test_counts_by_hand():
    # Two steps, two layers, two rows. Shares 1 and 0.95 belong to the last bin, 0.1 to the first.
    gates = np.array([[[1, 0], [1, 1]], [[0, 1], [1, 0]]], bool)
    execution = Execution(2)
    execution.add(gates, np.array([[1.0, 0.95], [0.1, 0.0]]))
    np.testing.assert_array_equal(execution.rows, [1] + [0] * (NUM_BINS - 2) + [2])
    np.testing.assert_array_equal(execution.executed[-1], [1, 2])
    np.testing.assert_array_equal(
        execution.executed[0], [0, 1]
    )  # the row without masks is left out


def test_edges_belong_to_the_bin_below():
    execution = Execution(1)
    shares = np.arange(1, 11, dtype=np.float32) / 10
    execution.add(np.ones((1, 10), bool), shares)
    np.testing.assert_array_equal(execution.rows, [1] * NUM_BINS)


def test_under_guidance_shares_repeat_for_the_second_half():
    execution = Execution(1)
    execution.add(np.array([[True, False, False, True]]), np.array([0.05, 0.95]))
    assert execution.rows[0] == execution.rows[-1] == 2
    assert execution.executed[0, 0] == execution.executed[-1, 0] == 1


def test_additions_add_up():
    gates = np.random.default_rng(0).random((3, 4, 6)) < 0.5
    shares = np.random.default_rng(1).random((3, 6))
    whole, parts = Execution(4), Execution(4)
    whole.add(gates, shares)
    for half in (slice(0, 2), slice(2, 6)):
        parts.add(gates[..., half], shares[..., half])
    assert whole.to_dict() == parts.to_dict()
    assert whole.rows.sum() == 18
    np.testing.assert_array_equal(whole.executed.sum(axis=0), gates.sum(axis=(0, 2)))
