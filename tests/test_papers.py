"""docs/papers.md points at what exists, and the numbers of the papers are those of the settings."""

import ast
import inspect
import re
import runpy
from functools import lru_cache
from pathlib import Path

import jax.numpy as jnp
import pytest

from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.config import EvalTask, ObjectiveConfig, OptimizerConfig, RouterConfig, TrainConfig
from dials_jax.evaluation.likelihood import log_likelihood
from dials_jax.skipping.routed import Routed
from dials_jax.skipping.similarity import choose_static_layers
from dials_jax.training.optimizer import update_moving_average

ROOT = Path(__file__).parents[1]
LINES = [
    line
    for line in (ROOT / "docs/papers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| item", "| ---"))
]
TARGET = re.compile(r"`([\w/.]+\.(?:py|md))(?::([\w.]+))?`")


@lru_cache
def names_in(path):
    """Functions and classes of a file, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split(" | ")[0].strip("| "))
def test_every_line_of_the_papers_page_has_a_target_or_is_open(line):
    where = line.split(" | ")[2]
    targets = TARGET.findall(where)
    assert targets or re.search(r"\bopen\b", where), "neither a target nor open"
    for file, name in targets:
        path = ROOT / file
        assert path.is_file(), f"{file} does not exist"
        assert not name or name in names_in(path), f"{name} is not in {file}"


@pytest.mark.parametrize(
    "paper, numbers", [("DIALS", range(1, 11)), ("Sedykh", range(1, 9))], ids=["DIALS", "Sedykh"]
)
def test_no_equation_is_left_out(paper, numbers):
    items = {line.split(" | ")[0].strip("| ") for line in LINES}
    assert {f"{paper} ({n})" for n in numbers} <= items


def test_tags_in_the_code_have_one_form():
    """An equation is found by its paper's name: `DIALS (7)`, not "equation 7"."""
    odd = re.compile(r"\bequations? \d|\bEq\. ?\d|, algorithm \d", re.I)
    proper = re.compile(r"(DIALS|Goel|LLaDA|MDLM|Sedykh), Algorithm \d")
    for path in [*ROOT.glob("dials_jax/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        text = proper.sub("", path.read_text(encoding="utf-8"))
        assert not odd.search(text), f"{path.relative_to(ROOT)}: {odd.search(text).group()}"


# ------------------------------------------------------------------------ the papers' numbers

NUMBERS = [  # of DIALS' routers: defaults, and the configuration for GSM8K
    ("learning_rate", 5e-5), ("b1", 0.9), ("b2", 0.95), ("weight_decay", 0.02),
    ("clip_norm", 1.0), ("lr_schedule", "cosine"), ("final_scale", 0.0),
]  # fmt: skip


def config_of(name):
    return runpy.run_path(str(ROOT / "configs" / name))["get_config"]()


def test_the_numbers_of_dials():
    cfg = config_of("llada/router_gsm8k.py")
    found = [(name, getattr(cfg.optimizer, name)) for name, _ in NUMBERS]
    assert found == NUMBERS  # appendix A.1
    default = OptimizerConfig(num_steps=1, warmup_steps=0)
    assert [(name, getattr(default, name)) for name, _ in NUMBERS] == NUMBERS
    assert (cfg.optimizer.num_epochs, cfg.optimizer.warmup_epochs) == (10, 2)  # 4.1; A.1
    assert cfg.batch_size == TrainConfig.__dataclass_fields__["batch_size"].default == 64  # A.1
    assert cfg.router == RouterConfig()
    assert (cfg.router.d_hidden, cfg.router.skip_threshold) == (512, 0.1)  # 3.2; 4.1
    assert inspect.signature(Routed).parameters["threshold"].default == 0.1  # 4.1
    assert cfg.objective.target_skip_rate == ObjectiveConfig().target_skip_rate == 0.5  # 4.1
    assert (
        cfg.objective.scale_skip_by_mask_ratio and cfg.objective.min_mask_ratio == 1e-3
    )  # (10); LLaDA
    assert cfg.objective.kind == "llada" and cfg.data.answer_length == 256  # Table 3


def test_the_numbers_of_dials_evaluation():
    for fn in (log_likelihood, EvalTask):
        assert inspect.signature(fn).parameters["num_samples"].default == 128  # Table 3
    (task,) = config_of("llada/sweep_gsm8k.py").tasks
    assert task.metric == "exact_match"
    assert (task.sampler.gen_length, task.sampler.block_length, task.sampler.steps) == (256,) * 3


@pytest.mark.parametrize("blocks", [4, 6, 8, 10, 12])
def test_the_numbers_of_sedykh(blocks):
    cfg = config_of(f"mdlm/blocks_{blocks}.py")
    rate, model = cfg.optimizer, cfg.model
    assert (rate.learning_rate, rate.b1, rate.b2, rate.weight_decay) == (3e-4, 0.9, 0.999, 0.0)
    assert (rate.lr_schedule, rate.warmup_steps, rate.num_steps) == ("constant", 2500, 1_000_000)
    assert (rate.ema, cfg.batch_size, cfg.data.length, cfg.dropout) == (0.9999, 512, 1024, 0.1)
    assert (model.num_layers, model.d_model, model.d_ff) == (blocks, 768, 4 * 768)
    assert cfg.objective.kind == "mdlm" and cfg.objective.min_mask_ratio == 1e-3


def test_the_moving_average_of_mdlm_has_a_ramp():
    """Its decay is min(decay, (1 + n) / (10 + n)) after n updates."""
    for n, decay in ((1, 2 / 11), (90, 91 / 100), (10**6, 0.9999)):
        found = update_moving_average(
            {"x": jnp.array(1.0)}, {"x": jnp.array(0.0)}, jnp.array(n), 0.9999
        )
        assert float(found["x"]) == pytest.approx(decay, abs=1e-6)


def test_the_numbers_of_goel_and_es_dllm():
    assert inspect.signature(choose_static_layers).parameters["threshold"].default == 0.95  # 3
    default = EarlySkip()
    assert default.proportions == (1.0, 0.5, 0.25) and default.depths == (0.0, 0.125, 0.25)
    assert (default.alpha, default.prompt_every, default.block_every) == (0.5, 64, 4)
