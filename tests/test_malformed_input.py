"""Of malformed inputs at every entry point each is refused in one line, or read rightly.

Here are 2,000, which take some 15 seconds of CPU time; `python -m tests.bad_input --cases 20000`
draws as many as wanted.
"""

import pytest

from tests.bad_input.entry_points import entry_points, run_all
from tests.bad_input.run import EntryPoint, command, outcome_of, table
from tests.bad_input.values import Case


@pytest.mark.usefixtures("untyped")
def test_malformed_inputs_end_in_one_line_or_in_a_right_result(tmp_path):
    tallies = run_all(tmp_path, num_cases=2000, seed=1)
    print(table(tallies))
    failures = [f"{t.name}: {kind}: {x}" for t in tallies for kind, x in t.failures.items()]
    assert not failures, "\n".join(failures)
    assert sum(tally.counts.total() for tally in tallies) > 1900
    assert all(tally.counts["one line"] for tally in tallies)


@pytest.mark.usefixtures("untyped")
def test_what_nobody_damaged_is_accepted(tmp_path):
    entries = [entry for entry in entry_points(tmp_path) if entry.right is not None]
    found = {entry.name: outcome_of(entry, Case(entry.right, False)) for entry in entries}
    assert len(found) >= 5 and set(found.values()) == {("accepted", "")}, found


def test_what_ends_otherwise_is_a_failure():
    def outcome(take, wrong=True):
        return outcome_of(EntryPoint("it", None, take), Case(3, wrong))[0]

    def exits(_):
        raise SystemExit(2)

    assert outcome(lambda x: 1 / 0) == "traceback"
    assert outcome(lambda x: x) == "wrong, accepted" and outcome(lambda x: x, False) == "accepted"
    assert outcome(lambda x: command(lambda: exits(x))) == "traceback"  # without a line
