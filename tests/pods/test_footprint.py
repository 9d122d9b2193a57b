"""What a compiled program takes is read from its text: loops, branches and groups count."""

import re

import jax
import pytest

from dials_jax.pods.footprint import (
    Collective,
    count_collectives,
    memory_that_is_missing,
    read_largest_collective,
)

PROGRAM = """HloModule step

%cond.1 (x: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%x), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%cond.2 (x: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%begins (p: f32[4]) -> (f32[4], f32[8]) {
  %g.1 = f32[8]{0:T(8)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3}}
  ROOT %c = (f32[4], f32[8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: f32[4]) -> f32[8] {
  %g.2 = f32[8]{0:T(8)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3}}
  %other = f32[8]{0} all-gather(%q), channel_id=8, replica_groups={{0,1},{2,3}}
  ROOT %c = f32[8] fusion(%g.2), kind=kLoop, calls=%plain
}

%all-reduce-scatter.3 (p: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %own = f32[16] dynamic-slice(%r, %id), dynamic_slice_sizes={16}
}

%body.1 (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (f32[4], f32[8]) fusion(%p), kind=kCustom, calls=%begins
  %b = f32[8] fusion(%a), kind=kOutput, calls=%goes_on
  %s = f32[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %inner = (s32[], f32[8]) while(%b), condition=%cond.3, body=%body.2, BACKEND
}

%body.2 (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %big = (f32[10]{0}, f32[20]{0}) all-reduce(%u, %v), channel_id=9, GROUPS
}

%body.3 (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %alone = f32[8] all-reduce(%u), channel_id=2, replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  %once = f32[8] all-to-all(%u), channel_id=3, replica_groups={{0,1,2,3}}
}

%small (x: f32[8]) -> f32[8] {
  %p = bf16[8] collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

%large (x: f32[8]) -> f32[8] {
  %p = (bf16[80], bf16[80]) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %w.1 = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
  %w.2 = (s32[], f32[8]) while(%t), condition=%cond.2, body=%body.3
  %c = f32[8] conditional(%i, %x, %y), branch_computations={%small, %large}
  %g = (f32[2], f32[8]) all-gather-start(%p), channel_id=5, replica_groups={{0,1,2,3}}
  %d = f32[8] all-gather-done(%g)
  ROOT %r = f32[4] reduce-scatter(%d), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""
PROGRAM = PROGRAM.replace("BACKEND", 'backend_config={"known_trip_count":{"n":"3"}}')
PROGRAM = PROGRAM.replace("GROUPS", "replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}")

EXPECTED = {
    Collective("all-gather", 4 * 8, 2): 2 * 5,  # channels 7 and 8, each once in a round
    Collective("reduce-scatter", 4 * 64, 4): 5,
    Collective("all-reduce", 4 * 30, 4): 3 * 5,
    Collective("all-to-all", 4 * 8, 4): 1,  # the number of rounds is not fixed
    Collective("collective-permute", 2 * 80, 1): 1,  # of the branch that sends most
    Collective("all-gather", 4 * 8, 4): 1,
    Collective("reduce-scatter", 4 * 16, 4): 1,
}


def test_every_collective_counts_as_often_as_it_runs():
    assert dict(count_collectives(PROGRAM)) == EXPECTED


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150)],
)
def test_a_ring_sends_all_but_the_own_part_and_a_sum_twice(kind, sent):
    assert Collective(kind, 100, 4).sent == sent


def test_a_program_of_one_device_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((4, 4), "float32")).compile()
    assert not count_collectives(compiled.as_text())


def test_the_largest_collective_is_found():
    program = """
      %a = f32[64,1000]{1,0} fusion(%x), kind=kLoop
      %b = (bf16[8,16]{1,0:T(8,128)}, f32[4,16]{1,0}) all-gather-start(%y), dimensions={0}
      ROOT %c = f32[10]{0} all-reduce(%z), to_apply=%sum
    """
    assert read_largest_collective(program) == 2 * 8 * 16
    assert read_largest_collective("%a = f32[3]{0} add(%x, %y)") == 0


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_is_missing_is_read_from_the_compilers_refusal(message):
    found = memory_that_is_missing(jax.errors.JaxRuntimeError(message))
    assert found == (20.5 * 2**30, 15.75 * 2**30)


def test_another_error_stays_what_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape("INTERNAL: Mosaic")):
        memory_that_is_missing(jax.errors.JaxRuntimeError("INTERNAL: Mosaic"))
