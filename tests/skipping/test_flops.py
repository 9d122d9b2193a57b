import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

from dials_jax.config import ModelConfig
from dials_jax.models import families
from dials_jax.skipping.flops import Flops, count_flops, head_flops, layer_flops, router_flops

TINY = ModelConfig(
    vocab_size=10, d_model=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=6,
    max_length=8, rope_theta=1e4, norm_eps=1e-5, mask_id=9, eos_id=0, pad_id=0,
)  # fmt: skip


class Router(NamedTuple):
    """A policy whose decisions cost what routers of this width do."""

    width: int

    def prepare(self, num_layers, denoising):
        raise NotImplementedError

    gate = prepare

    def flops(self, cfg, num_tokens):
        return router_flops(cfg, num_tokens, self.width)


def test_results_on_disk_keep_their_keys():
    flops = Flops(0.4, 0.5, 50.0, 1.0)
    stored = {"layers_run": 0.4, "model": 0.5, "model_total": 50.0, "seconds": 1.0}
    assert flops.to_dict() == stored and Flops.from_dict(stored) == flops
    assert flops.model == flops.flops_share  # its name in earlier versions


def test_a_layer_by_hand():
    # Weights: q and o 4 * 4 each, k and v 4 * 2 each, three of 4 * 6: 16 + 16 + 8 + 8 + 72 = 120.
    # Attention of one token to 3: scores and values, 3 * 4 products each: 24.
    # Two FLOPs a product, 3 tokens: 2 * 3 * (120 + 24) = 864.
    assert layer_flops(TINY, 3) == 864


def test_a_dit_layer_by_hand():
    # Weights: q, k, v and o 8 * 8 each, two of 8 * 32: 256 + 512 = 768. Attention of one token to
    # 3: scores and values, 3 * 8 products each: 48. Biases, norms and constants count nothing.
    cfg = families.mdlm_small(2, 8, 10, 9, 0, 0, head_dim=4, cond_dim=5)
    assert layer_flops(cfg, 3) == 2 * 3 * (768 + 48)
    # The time costs a map from 5 to 6 vectors of 8, once a row.
    timed = dataclasses.replace(cfg, time_conditioning=True)
    assert layer_flops(timed, 3) - layer_flops(cfg, 3) == 2 * 5 * 6 * 8


def test_the_head_of_mdlm_is_the_share_that_the_paper_leaves_out():
    # Protocols, Sedykh et al.: about 31 % of 12 blocks and 58 % of 4.
    for num_blocks, share in ((12, 0.29), (4, 0.55)):
        cfg = families.mdlm(num_blocks)
        head, body = head_flops(cfg, 1024), num_blocks * layer_flops(cfg, 1024)
        assert head / (head + body) == pytest.approx(share, abs=0.03)


def test_head_and_router_by_hand():
    assert head_flops(TINY, 3) == 2 * 3 * 4 * 10
    assert router_flops(TINY, 3, 5) == 2 * 3 * (4 * 5 + 5 * 2)


def test_a_run_by_hand():
    # 2 calls of 1 row; 3 of 4 layers run; head on 2 positions, 160;
    # 2 routers of width 5 a call, 180 each.
    gates = np.array([[[True], [True]], [[True], [False]]])
    flops = count_flops(TINY, gates, num_tokens=3, head_tokens=2, policy=Router(5), seconds=1.5)
    total = 3 * 864 + 2 * 160 + 2 * 2 * 180
    assert flops.layers_run == 0.75
    assert flops.model_total == total
    assert flops.flops_share == pytest.approx(total / (4 * 864 + 2 * 160))
    assert flops.seconds == 1.5


def test_a_window_pays_for_its_tokens_and_sees_all_keys():
    # 2 tokens of 3: each pays 120 for the weights and 24 for attention to 3 keys.
    assert layer_flops(TINY, 2, 3) == 2 * 2 * (120 + 24)
    assert layer_flops(TINY, 3, 3) == layer_flops(TINY, 3)


def test_a_cached_run_by_hand():
    # 2 calls of 2 rows on canvases of 3: one whole, one on 2 tokens and then on 1. The second row
    # skips the second layer of the second call. A call gives logits of 2 tokens, then of 1.
    gates = np.ones((2, 2, 2), bool)
    gates[1, 1, 1] = False
    flops = count_flops(
        TINY, gates, num_tokens=3, head_tokens=np.array([2, 1]), policy=Router(5),
        tokens_run=np.array([[3, 3], [2, 1]]), voting=np.array([[1, 1], [2, 1]]),
    )  # fmt: skip
    a_token = 2 * (120 + 24)
    total = (12 + 4 + 1) * a_token + 2 * (3 * 80 + 5 * 60)
    assert flops.model_total == total
    assert flops.flops_share == pytest.approx(total / (4 * (6 * a_token + 160)))
    assert flops.layers_run == 7 / 8  # of the layers, whatever they run on


def test_one_layer_of_32_is_the_papers_number():
    cfg = families.llada_8b()
    gates = np.ones((32, 1), bool)
    gates[4] = False
    flops = count_flops(cfg, gates, num_tokens=1000, head_tokens=1000)
    assert flops.layers_run == 31 / 32 == 0.96875
    head_share = head_flops(cfg, 1000) / (head_flops(cfg, 1000) + 32 * layer_flops(cfg, 1000))
    assert head_share == pytest.approx(0.067, abs=0.002)
    assert flops.flops_share == pytest.approx(1 - (1 - head_share) / 32)


def test_full_execution_costs_all():
    flops = count_flops(TINY, np.ones((5, 2, 3), bool), num_tokens=7, head_tokens=7)
    assert flops.layers_run == flops.flops_share == 1
    assert flops.model_total == 15 * (2 * layer_flops(TINY, 7) + head_flops(TINY, 7))


def test_sums_weigh_shares_by_what_they_are_shares_of():
    # Full runs of 100 and 300 FLOPs; 50 and 300 are spent.
    total = Flops.sum([Flops(0.4, 0.5, 50.0, 1.0), Flops(1.0, 1.0, 300.0, 2.0)])
    assert total == pytest.approx(Flops((0.4 * 100 + 300) / 400, 350 / 400, 350.0, 3.0))


def test_a_sum_equals_one_count_over_all_rows():
    gates = np.random.default_rng(0).random((6, 2, 4)) < 0.7
    cfg = dataclasses.replace(TINY, d_ff=9)

    def count(part):
        return count_flops(cfg, part, num_tokens=5, head_tokens=2, policy=Router(3))

    assert Flops.sum([count(gates[:2]), count(gates[2:])]) == pytest.approx(count(gates))


def test_more_than_64_bits_hold():
    gates = np.ones((1024, 32, 256), bool)
    flops = count_flops(families.llada_8b(), gates, num_tokens=4096, head_tokens=512)
    assert flops.flops_share == pytest.approx(1) and flops.model_total > 2**63
