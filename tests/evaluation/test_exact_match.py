"""What exact match calls right. The values are lm-evaluation-harness's (0.4.13) unless said."""

import dataclasses
from itertools import product

import pytest

from dials_jax.config import ArithmeticData, EvalTask
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.errors import InputError
from dials_jax.evaluation.exact_match import (
    check_reference,
    is_correct,
    normalise_answer,
    normalise_number,
)
from dials_jax.evaluation.text_end import cut_at_stop, decode_to_end, is_ended

STRICT = EvalTask(
    name="gsm8k",
    metric="exact_match",
    data=ArithmeticData(),
    extract=r"#### (-?[0-9.,]+)",
    match="first",
    until=("Question:", "</s>", "<|im_end|>"),
)
FLEXIBLE = dataclasses.replace(STRICT, extract=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", match="last")
REFERENCE = "9+9=18\n#### 18"


@pytest.mark.parametrize(
    "text, extract, match, expected",
    [
        ("a 1 b 22 c", r"\d+", None, "1"),  # the first match
        ("a 1 b 22 c", r"\d+", "first", "1"),
        ("a 1 b 22 c", r"\d+", "last", "22"),
        ("x #### 1,234", r"#### (.*)", None, "1234"),  # group 1
        ("The answer is 18.", r"answer is (.*)", None, "18"),
        ("so 18", r"is (\d+)|so (\d+)", None, "18"),  # the group that took part
        ("is 17 so 18", r"is (\d+)|so (\d+)", "last", "18"),
        ("A: 7 b", r"(A|B): (\d+)", None, "A"),  # of several, the first
        ("nothing", r"#### (.*)", None, ""),
        ("b", r"a|(b)?c|b", None, ""),  # no group took part
        ("", "", None, ""),
    ],
)
def test_the_match_that_counts(text, extract, match, expected):
    assert normalise_answer(text, extract, match) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("$1,000.50", "1000.50"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("18$", "18"),
        ("1,234,567", "1234567"),
        ("12,34,567", "1234567"),
        ("18,", "18"),
        ("18.", "18"),
        ("1,000.,", "1000"),
        (".5", ".5"),
        ("18.0", "18.0"),  # not 18
        ("18..", "18.."),
        ("  Paris. ", "Paris."),  # words keep their period, as does what is no number
        ("$", "$"),
        ("", ""),
        ("50%", "50"),  # there the sign is left out by the expression
        ("$5%.", "5"),
        ("3,4", "3,4"),  # there 34; here a pair is none
        ("1,2,3", "1,2,3"),
    ],
)
def test_numbers_are_spelt_alike(text, expected):
    assert normalise_number(text) == expected
    assert normalise_number(expected) == expected


@pytest.mark.parametrize(
    "output, strict, flexible",
    [
        (" 9+9=18\n#### 18", True, True),
        (" 9+9=18\n#### 18\n\nQuestion: 3+4?\nAnswer: #### 7", True, True),
        ("#### 18\n#### 7", True, False),
        ("#### 7\n#### 18", False, True),
        ("18</s> #### 7", False, True),
        ("#### $18", False, True),
        ("#### 18%", True, True),
        ("#### 18.", True, True),
        ("#### 18,", True, True),
        ("#### 18.00", False, False),
        ("#### -18", False, False),
        ("It is 1 8", False, False),
        ("no number", False, False),
        ("", False, False),
        ("Question: #### 18", False, False),
    ],
)
def test_gsm8k_is_scored_as_published(output, strict, flexible):
    assert is_correct(STRICT, output, REFERENCE) == strict
    assert is_correct(FLEXIBLE, output, REFERENCE) == flexible


def test_the_first_of_all_stop_strings_ends_the_text():
    assert cut_at_stop("ab cd ef", ("ef", "cd", "x")) == "ab "
    assert cut_at_stop("ab", ("x",)) == cut_at_stop("ab", ()) == "ab"
    assert cut_at_stop("ab", ("a",)) == ""


@pytest.mark.parametrize(
    "changes, reference, message",
    [
        ({"extract": "A: (.*)"}, REFERENCE, "finds nothing in the answer"),
        ({"extract": r"\d+", "match": None}, REFERENCE, "finds 2 answers .*match='first' or"),
        ({"until": ("\n",)}, REFERENCE, "until=.* stands before what counts"),
        ({"until": ("9",), "extract": ""}, "19", "until=.* stands before what counts"),
        ({"extract": "("}, REFERENCE, r"extract='\(': .*; correct the expression"),
    ],
)
def test_a_reference_that_cannot_be_matched_is_an_input_error(changes, reference, message):
    with pytest.raises(InputError, match=message):
        check_reference(dataclasses.replace(STRICT, **changes), reference)


def test_a_reference_may_repeat_its_answer():
    task = dataclasses.replace(STRICT, match=None)
    check_reference(task, "#### 1,800 or #### 1800")
    check_reference(dataclasses.replace(task, extract=""), "9 and 18")
    check_reference(FLEXIBLE, REFERENCE)


@pytest.mark.parametrize("until", [("ab",), ("bc", "ca"), ("aa", "aaa"), ("abc", "ca"), ("[EOS]",)])
def test_a_text_has_ended_once_nothing_behind_it_can_change_it(cfg, until):
    """Over all texts of three letters; the harness cuts at one stop string after the other."""
    text = character_tokenizer("abc")

    def cut(ids):
        whole = decode_to_end(ids, text, cfg, until)
        for stop in until:
            whole = whole.split(stop)[0]
        return whole

    letters = [*text.encode("abc"), cfg.eos_id]
    ended = []
    for ids in map(list, product(letters, repeat=4)):
        if is_ended(ids, text, cfg, until):
            ended.append(ids)
            assert len({cut([*ids, *more]) for more in product(letters, repeat=2)}) == 1
    assert [letters[0], letters[0], cfg.eos_id, letters[1]] in ended
    assert until == ("[EOS]",) or any(cfg.eos_id not in ids for ids in ended)
