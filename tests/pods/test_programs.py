"""What is compiled for a pod is what runs: the loop's own step, and the programs of generation."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dials_jax import compiling, sharding
from dials_jax.caching.plain import DualCache
from dials_jax.config import (
    ArithmeticData,
    CorpusData,
    EvalConfig,
    EvalTask,
    MeshConfig,
    OptimizerConfig,
    RouterConfig,
    TaskData,
    TextData,
)
from dials_jax.data.batches import batch_at
from dials_jax.data.sources import may_pad_rows, row_length
from dials_jax.errors import InputError
from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.loading import load, read_formats
from dials_jax.models import families
from dials_jax.models.model import Model, sequence_keys
from dials_jax.pods import programs
from dials_jax.pods.footprint import read_footprint
from dials_jax.pods.lowering import inference_shapes, lower_scoring, routed_shapes
from dials_jax.pods.programs import Answering, answering_programs, sweep_programs, training_programs
from dials_jax.pods.topology import Pod
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.sampling.refill import generate_refilled
from dials_jax.skipping.routed import Routed
from dials_jax.training.loop import train
from dials_jax.training.run import prepare_run
from tests.conftest import init_params, random_routers, small_config


class Here(Pod):
    """This machine's one device."""

    def __init__(self):
        super().__init__("cpu:1", jax.devices()[:1])


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("changes", [{}, {"layout": "unrolled"}, {"num_microbatches": 2}])
def test_what_is_kept_is_what_training_keeps(changes, train_config, tmp_path):
    optimizer = OptimizerConfig(num_steps=2, warmup_steps=1, ema=0.9)
    cfg = train_config(optimizer=optimizer, **changes)
    state, mesh = train(cfg, tmp_path), sharding.make_mesh(cfg.mesh)
    data = prepare_run(cfg, mesh).data
    batch = batch_at(data, 0, 0, cfg.batch_size)
    (program,) = training_programs(cfg, Here())
    found = read_footprint(program.lower().compile())
    # Rows without padding bring no array that says so, and one device needs no collective.
    expected = num_bytes(state) + num_bytes(batch._replace(valid=None))
    assert found.kept == pytest.approx(expected, abs=64)
    assert found.peak > found.kept and found.largest_collective == 0
    assert program.tokens == batch.tokens.size


def test_routers_keep_little_beside_their_model(train_config):
    router = RouterConfig(d_hidden=8)
    cfg = train_config(backbone="anywhere", router=router, layout="unrolled")
    backbone = small_config(dtype="bfloat16")
    alone, kept = dataclasses.replace(cfg, model=backbone, backbone=""), []
    for one, shape in ((cfg, backbone), (alone, None)):
        (program,) = training_programs(one, Here(), shape, 16)
        kept.append(read_footprint(program.lower().compile()).kept)
    assert kept[0] < kept[1] / 3  # two bytes a parameter, not twelve


@pytest.mark.parametrize(
    ("data", "length", "padded"),
    [
        (TextData(length=64), 64, True),
        (TextData(length=64, random_length_prob=0.0), 64, False),
        (CorpusData(folder="anywhere", length=32), 32, False),
        (TaskData(prompt_length=6, answer_length=4), 10, True),
        (ArithmeticData(digits=2), 12, False),
    ],
)
def test_the_length_of_rows_is_known_without_data(data, length, padded):
    assert (row_length(data), may_pad_rows(data)) == (length, padded)


def test_knobs_come_one_by_one_and_then_together(train_config):
    cfg, pod = train_config(batch_size=8), Pod("8", [None] * 8)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(data=4, tensor=2))

    def shaped(mesh, devices):
        return jax.sharding.AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), sharding.AXES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.sharding, "make_mesh", shaped)
        found = list(programs.training_knobs(cfg, pod))
    assert [options for options, _ in found] == [
        "--num-microbatches 2",
        "--mesh.data 1 --mesh.fsdp 4",
        "--remat",
        "--num-microbatches 2 --mesh.data 1 --mesh.fsdp 4 --remat",
    ]
    assert found[-1][1] == dataclasses.replace(
        cfg, num_microbatches=2, remat=True, mesh=MeshConfig(data=1, fsdp=4, tensor=2)
    )


# ---------------------------------------------------------------------- generation and evaluation


class Reached(Exception):
    """A program that a run has come to; it is not compiled."""


@pytest.fixture
def lowered_by(monkeypatch):
    """`lowered_by(name, run)`: the text of the program of this name that a run makes."""

    def reach(name, run):
        lower = compiling.Timed.lower

        def recorded(self, *args, **kwargs):
            found = lower(self, *args, **kwargs)
            if self.__name__ == name:
                raise Reached(found.as_text())
            return found

        compiling.forget_programs()
        with monkeypatch.context() as patch, pytest.raises(Reached) as seen:
            patch.setattr(compiling.Timed, "lower", recorded)
            run()
        return plain(str(seen.value))

    return reach


def plain(text):
    """Without marks of arrays that are whole on every device, which may be left out."""
    return re.sub(r" \{sdy\.sharding = #sdy\.sharding<@mesh, \[(\{\}(, )?)*\]>\}", "", text)


PROMPTS = np.arange(2, 10).reshape(2, 4)
VALID = np.array([[False, True, True, True], [True] * 4])


@pytest.mark.parametrize("valid", [VALID, None])
def test_the_program_of_a_batch_is_generates_own(valid, model, lowered_by):
    # By a threshold, so that the steps are not known beforehand.
    sampler, cache = Confidence(gen_length=8, block_length=4, threshold=0.9), DualCache()
    how = {"sampler": sampler, "cache": cache}
    own = lowered_by("generate_program", lambda: generate(model, PROMPTS, valid, **how))
    for padded in (True, False):
        answering = Answering(model.config, sampler, 2, 4, padded, cache=cache)
        (program,) = answering_programs(answering, Here())
        assert (plain(program.lower().as_text()) == own) is (padded is (valid is not None))
    assert program.label == "2 answers of 8 tokens to prompts of 4" and program.passes == 8


def test_a_divided_generation_takes_no_more_than_its_whole(model):
    sampler, cache = Confidence(gen_length=8, block_length=4), DualCache()
    answering = Answering(model.config, sampler, 2, 4, cache=cache)
    (program,) = answering_programs(answering, Here())
    whole = read_footprint(program.lower().compile())
    with compiling.programs_used() as used:
        generate(model, PROMPTS, VALID, sampler=sampler, cache=cache)
    peaks = [read_footprint(one).peak for one in used]
    assert len(peaks) == 3 and 0.5 * whole.peak < max(peaks) <= whole.peak


def test_answers_that_may_end_early_are_filled_block_by_block(model, lowered_by):
    sampler, prompts = Confidence(8, 4, stop_at_eos=True), PROMPTS.tolist()
    how = {"sampler": sampler, "keys": sequence_keys(None, 2), "batch_size": 2, "length": 4}
    own = lowered_by("block_program", lambda: next(generate_refilled(model, prompts, **how)))
    (program,) = answering_programs(Answering(model.config, sampler, 2, 4), Here())
    assert plain(program.lower().as_text()) == own
    assert program.label.startswith("a block, one of 2, of 2 answers")


def test_a_sampler_of_several_programs_shows_the_one_that_takes_the_steps(lowered_by):
    ids = {"mask_id": 63, "eos_id": 1, "pad_id": 0}
    cfg = families.mdlm_small(1, 64, 64, **ids, max_length=32, dtype="float32")
    sampler, model = Ancestral(length=8, steps=4), Model(cfg, init_params(cfg))
    own = lowered_by("segment_program", lambda: generate(model, sampler=sampler, num_sequences=2))
    (program,) = answering_programs(Answering(cfg, sampler, 2, 0, False), Here())
    assert plain(program.lower().as_text()) == own


def test_the_program_of_likelihoods_is_that_of_score_pairs(model, lowered_by):
    pairs, cfg = pad_pairs([([2, 3], [4, 5, 6]), ([2], [3])], model.config), model.config
    routers = jax.device_put(random_routers(cfg), sharding.replicated(model.mesh))
    how = {"stratum": 4, "policy": Routed(routers, 0.3)}
    own = lowered_by(
        "score_pairs_program",
        lambda: score_pairs(model, pairs, sequence_keys(None, 2), np.arange(2), **how),
    )
    routed = routed_shapes(cfg, RouterConfig(d_hidden=8), model.mesh, 0.3)
    params = inference_shapes(cfg, model.mesh)
    found = lower_scoring(cfg, params, model.mesh, (2, 5, 3), stratum=4, policy=routed)
    assert plain(found.as_text()) == own


@pytest.mark.parametrize("layout", ["stacked", "unrolled", "fused"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_shapes_are_those_of_a_loaded_model(layout, weights, arithmetic_model):
    model = load(arithmetic_model, layout=layout, weights=weights)
    dtype, weights = read_formats(arithmetic_model, None, weights)
    found = inference_shapes(model.config, model.mesh, layout, weights, dtype)
    actual = jax.tree.map(lambda x: (x.shape, x.dtype), model.inference_params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == actual


def test_a_sweep_compiles_its_longest_items(arithmetic_model):
    data = ArithmeticData(num_items=40)
    tasks = (
        EvalTask(name="sums", metric="exact_match", data=data, limit=3),
        EvalTask(name="bound", metric="nelbo", data=data, limit=3, num_samples=4),
    )
    settings = {"tasks": tasks, "batch_size": 4, "num_static": (1,), "num_random": ()}
    cfg = EvalConfig(model=str(arithmetic_model), **settings)
    found = sweep_programs(cfg, Here())
    assert [program.label for program in found] == [
        "sums, all layers: 4 answers of 5 tokens to prompts of 7",
        "bound, all layers: 4 copies of 11 tokens",
    ]
    assert all(program.flops > 0 and program.tokens > 0 for program in found)


def test_a_router_of_another_model_is_refused(arithmetic_model, monkeypatch):
    info = type("Info", (), {"num_layers": 9, "d_model": 32})
    monkeypatch.setattr(programs, "router_facts", lambda path: (path, info))
    cfg = Answering(small_config(), Confidence(4), 2, 4, router="runs/other")
    with pytest.raises(InputError, match="is for 9 layers of width 32, this model has 4 of 32"):
        answering_programs(cfg, Here())
