"""`dials bench`: every policy with every cache, timed in turns on a folder of one's own."""

import json

import pytest

from dials_jax.cli.bench import bench_command, parse_policy
from dials_jax.errors import InputError
from dials_jax.evaluation.timing import time_in_turns, turns


@pytest.fixture
def bench(arithmetic_model, capsys):
    """Runs the command; returns what it prints."""

    def run(*options):
        sizes = ["--num-prompts", "3", "--prompt-length", "4", "--max-new-tokens", "4"]
        sizes = sizes[4 * bool({"--prompt", "--file"} & {*options}) :]  # of random prompts
        bench_command([str(arithmetic_model / "model"), *sizes, "--batch-size", "2", *options])
        return capsys.readouterr().out

    return run


def test_a_row_per_policy_and_cache(bench):
    shown = bench("--policies", "full", "static=0", "--caches", "none", "dual", "--repeats", "2")
    header, *lines = shown.splitlines()[:5]
    assert header.split()[:5] == ["policy", "cache", "seconds", "speed-up", "tokens/s"]
    assert [line.split()[:2] for line in lines] == [
        ["full", "none"], ["full", "dual"], ["static=0", "none"], ["static=0", "dual"],
    ]  # fmt: skip
    assert " 1.00x " in lines[0] and " 75.0% " in lines[2] and "the median of 2 repeats" in shown


def test_json_has_every_time_and_where_it_was_measured(bench):
    shown = bench("--prompt", "+12,34=", "--prompt", "s7,5=", "--repeats", "3", "--json")
    found = json.loads(shown)
    [row] = found["rows"]
    assert len(row["all_seconds"]) == 3 and min(row["all_seconds"]) > 0
    assert row["seconds"] == sorted(row["all_seconds"])[1]
    assert row["layers_run"] == 1.0 and row["program_gb"] > 0
    assert found["environment"]["prompts"] == 2
    assert found["environment"]["prompt_tokens"] == [5, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "ful"], "policy 'ful' is not known; did you mean 'full'"),
        (["--policies", "static=x"], "give numbers, as static=7"),
        (["--policies", "random=1+2"], "give numbers, as static=7"),
        (["--policies", "random=0"], "give numbers, as static=7"),
        (["--policies", "full", "full"], "--policies full full names one twice"),
        (["--caches", "none", "none"], "--caches none none names one twice"),
        (["--num-prompts", "0"], "--num-prompts=0 must be positive"),
        (["--prompt", "1", "--prompt-length", "4"], "--prompt-length is of random prompts"),
        (["--chat"], "--chat: random prompts are no text"),
        (["--seed", "-3"], "seed=-3 must lie in 0 to"),
        (["--policies", "router"], "give a value, as router=DIR"),
        (["--policies", "static=9"], "9"),
        (["--caches", "duel"], "cache 'duel' is not known; did you mean 'dual'"),
        (["--repeats", "0"], "--repeats=0 must be positive"),
        (["--batch-size", "0"], "--batch-size=0 must be positive"),
        (["--prompt-length", "900"], "a prompt has 900 tokens, and the model"),
        (["--stop", "x"], "--stop: answers are timed as a whole"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_wrong_options_are_one_line_before_anything_is_timed(options, message, bench, monkeypatch):
    monkeypatch.setattr("dials_jax.bench.time_in_turns", None)
    with pytest.raises(InputError, match=message):
        bench(*options)


def test_policies_by_name():
    assert parse_policy("full") == {}
    assert parse_policy("router=runs/r=1") == {"router": "runs/r=1"}
    assert parse_policy("static=7+9") == {"static": (7, 9)}
    assert parse_policy("random=2") == {"num_random": 2}


class Out:
    def __init__(self, seconds):
        self.flops = self
        self.seconds = seconds


def test_every_turn_begins_with_another_one_and_the_first_run_is_not_timed(untyped):
    assert list(turns(2, 3)) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 0)]
    order, times = [], iter([90.0, 80.0, 1.0, 5.0, 7.0, 3.0])

    def runner(name):
        def run():
            order.append(name)
            return [Out(next(times))]

        return run

    first, second = time_in_turns([runner("a"), runner("b")], 2)
    assert "".join(order) == "ababba"
    assert (first.seconds, second.seconds) == ([1.0, 3.0], [5.0, 7.0])
    assert (first.median, first.spread) == (2.0, 1.0)
