"""The benchmarks run at all, write what they print, and refuse names in one line."""

import json

import pytest

from benchmarks import command, decode, evaluate, forward, observe, router_overhead


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


def test_decode_prints_and_writes_a_row_per_case(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 2 --batch 2 --prompt 4 --gen 4 --block 4 --repeats 1"
    arguments += f" --caches none dual --policies static-1 --out {path}"
    assert decode.main(arguments.split()) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["none", "dual"]
    for row in rows:
        assert row["nfe"] == 4 and row["layers_run"] == 0.5 and row["ms_a_call"] > 0
    assert rows[1]["flops_share"] < rows[0]["flops_share"]
    *_, none, dual = capsys.readouterr().out.splitlines()
    assert none.split()[:4] == ["none", "static-1", "2", "4"] and dual.startswith("dual")


def test_evaluate_compares_generation_and_likelihood(tmp_path):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 2 --prompts 5 --shortest 2 --prompt 6 --gen 8 --block 4"
    arguments += " --steps 8 --end-after 4 --batch 2 --pairs 2 --answer 9 --samples 2"
    arguments += f" --likelihood-batch 2 --programs 1 --repeats 1 --out {path}"
    assert evaluate.main(arguments.split()) == 0
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["waiting", "refilled", "bare pass", "likelihood"]
    assert rows["refilled"]["equal"] == 1 and rows["waiting"]["against"] == 1
    assert rows["likelihood"]["requests"] == 4


def test_forward_prints_and_writes_a_row_per_case(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 2 --batches 2 --tokens 6 --prompt 3 --shares 0.5"
    assert forward.main([*arguments.split(), "--repeats", "1", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    executed = {row["case"]: row["executed"] for row in rows}
    assert executed == {
        "every layer, no gate": 1.0,
        "compact, 50% of layers": 0.5,
        "static, half the layers": 0.5,
        "routers, every layer runs": 1.0,
        "routers, no layer runs": 0.0,
    }
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_router_overhead_prints_the_rows_of_the_paper(tmp_path):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 2 --tokens 6 --prompt 2 --repeats 1 --passes 1"
    hidden = 4096  # so many that their weights are most of what routers add
    arguments += f" --d-hidden {hidden}"
    assert router_overhead.main([*arguments.split(), "--out", str(path)]) == 0
    rows = {row["metric"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["parameters", "memory", "latency per layer", "FLOPs per prompt"]
    # Per layer: a norm of 64, 64 x hidden weights with as many biases, hidden x 2 weights with 2.
    count = 2 * (64 + 64 * hidden + hidden + hidden * 2 + 2)
    assert rows["parameters"]["routers_value"] == count
    assert 4 * count < rows["memory"]["routers_value"] < 3 * 4 * count
    # Four passes, two layers, four tokens that vote: 2 FLOPs per weight.
    assert rows["FLOPs per prompt"]["routers_value"] == 4 * 2 * 4 * 2 * (64 + 2) * hidden
    for row in rows.values():
        assert row["increase"] == pytest.approx(row["routers_value"] / row["baseline_value"])


def test_observe_times_the_study_beside_generation(tmp_path):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 2 --prompts 3 --prompt 4 --gen 4 --steps 2 --batch 2"
    assert observe.main([*arguments.split(), "--repeats", "1", "--out", str(path)]) == 0
    alone, study = json.loads(path.read_text())["rows"]
    assert alone["case"] == "generation" and alone["against"] == 1
    assert study["against"] == pytest.approx(study["seconds"] / alone["seconds"])
    assert study["program_gb"] > 0 and alone["program_gb"] > 0


SMALL = "--model tiny --layers 1 --batch 1 --prompt 2 --repeats 0 --caches none"


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (
            observe,
            "--model qwen2_5_7b",
            "--model qwen2_5_7b is causal: its study is one more pass over the texts; give a "
            "diffusion model",
        ),
        (decode, "--model tinny", "model 'tinny' is not known; did you mean 'tiny'?"),
        (forward, "--model tiny --tokens 8 --prompt 4 --out .", "--out . is a folder; name a file"),
        (forward, "--model tinny", "model 'tinny' is not known; did you mean 'tiny'?"),
        (
            forward,
            "--model tiny --tokens 256",
            "--prompt 256 leaves none of --tokens 256 masked, and routers would skip nothing; "
            "shorten it",
        ),
        (
            router_overhead,
            "--model tiny --tokens 8 --prompt 8",
            "--prompt 8 leaves none of --tokens 8 to generate",
        ),
        (forward, "--model tiny --shares 50", "--shares 50: a share lies in [0, 1]"),
        (decode, "--model tiny --caches duel", "cache 'duel' is not known; did you mean 'dual'?"),
        (
            decode,
            f"{SMALL} --gen 4 --block 4 --policies full rooted-1",
            "policy 'rooted-1' is not known; did you mean 'routed'?",
        ),
        (
            decode,
            f"{SMALL} --gen 4 --block 4 --policies full static-2",
            "policy 'static-2' skips more layers than the 1 there are",
        ),
        (
            decode,
            f"{SMALL} --gen 4 --block 4 --policies full random-2",
            "policy 'random-2' skips more layers than the 1 there are",
        ),
        (
            decode,
            f"{SMALL} --gen 4 --block 3",
            "gen_length=4 must be divisible by block_length=3",
        ),
    ],
)
def test_wrong_arguments_give_one_line_and_no_case_runs(capsys, module, arguments, message):
    assert module.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}\n" and not printed.out
