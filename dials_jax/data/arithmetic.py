"""The procedural task of the demo: operations on two short numbers, one token per character.

    add      +37,58=   095    carries: a digit depends on those to its right
    reverse  r37,58=   8573   moves digits
    max      >37,58=   58     compares, then copies
    sort     s37,58=   3578   every digit depends on all

All prompts have the same length, and so have all answers of one operation. The operations differ in
difficulty, so it matters which layers each sequence skips. Sums take several times as long to learn
as the others and are not in the demo.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from itertools import chain, islice

from dials_jax.config import ArithmeticData
from dials_jax.data.batches import random_generator
from dials_jax.data.tasks import TaskRows
from dials_jax.data.tokenizer import Tokenizer, character_tokenizer
from dials_jax.errors import nearest, require

SYMBOLS = {"add": "+", "reverse": "r", "max": ">", "sort": "s"}
HELD_OUT_ONE_IN = 10  # one of this many prompts is held out for testing
NUM_TEST = 1000  # items of a test that names no number


def solve(operation: str, a: str, b: str) -> str:
    """Returns the answer. `a` and `b` are operands with the same number of digits."""
    if operation == "add":
        return f"{int(a) + int(b):0{len(a) + 1}d}"
    if operation == "max":
        return max(a, b)
    return (a + b)[::-1] if operation == "reverse" else "".join(sorted(a + b))


class ArithmeticTask:
    """Items of the chosen operations, split into training and test by a hash of the prompt.

    Raises: InputError for an unknown or repeated operation, and for numbers of digits or items that
      are out of range.
    """

    def __init__(self, cfg: ArithmeticData):
        require(bool(cfg.operations), f"operations is empty; choose from {', '.join(SYMBOLS)}")
        for name in cfg.operations:
            require(name in SYMBOLS, f"unknown operation {name!r}{nearest(name, SYMBOLS)}")
        require(
            len(set(cfg.operations)) == len(cfg.operations),
            f"operations={cfg.operations} names one twice; name each once",
        )
        # Every pair of operands is listed once, 10 ** (2 * digits) of them.
        require(1 <= cfg.digits <= 3, f"digits={cfg.digits} must be 1, 2 or 3")
        require(cfg.num_items > 0, f"num_items={cfg.num_items} must be positive")
        self.cfg = cfg

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """One token per character."""
        return character_tokenizer("0123456789,=" + "".join(SYMBOLS.values()))

    @property
    def prompt_length(self) -> int:
        """In tokens: two operands, a symbol, a comma and an equals sign."""
        return 2 * self.cfg.digits + 3

    @property
    def answer_length(self) -> int:
        """In tokens: the longest answer and the end of text."""
        return max(2 * self.cfg.digits, self.cfg.digits + 1) + 1

    @functools.cached_property
    def training_rows(self) -> TaskRows:
        """`num_items` distinct rows that alternate between the operations.

        Raises: InputError if there are fewer training items than that.
        """
        return self._rows(self._first_records(self.cfg.num_items, held_out=False))

    @functools.cached_property
    def held_out_rows(self) -> TaskRows:
        """Rows that neither training nor a test of `NUM_TEST` items contains.

        Raises: InputError if there are none.
        """
        records = list(islice(self.records(held_out=True), NUM_TEST, None))
        require(
            bool(records),
            f"digits={self.cfg.digits} gives no item beside those of training and test; raise "
            "digits, or train without validation",
        )
        return self._rows(records)

    def _rows(self, records: list[dict[str, str]]) -> TaskRows:
        texts = [text for r in records for text in (r["prompt"], r["answer"])]
        ids = self.tokenizer.encode_batch(texts)
        return TaskRows(
            pairs=list(zip(ids[::2], ids[1::2], strict=True)),
            prompt_length=self.prompt_length,
            answer_length=self.answer_length,
            eos_id=self.tokenizer.token_to_id("[EOS]"),
            pad_id=self.tokenizer.token_to_id("[PAD]"),
        )

    def test_records(self, n: int = NUM_TEST) -> list[dict[str, str]]:
        """Returns `n` items that no training set of this `split_seed` contains.

        Each has the fields prompt, answer and operation. A larger `n` begins with the same items.

        Raises: InputError if there are fewer test items than that.
        """
        return self._first_records(n, held_out=True)

    def records(self, held_out: bool) -> Iterator[dict[str, str]]:
        """Yields all test items (`held_out`) or training items, alternating between operations."""
        streams = [self._operation_records(name, held_out) for name in self.cfg.operations]
        # Not strict: the shortest stream ends them all, so that operations stay balanced.
        return chain.from_iterable(zip(*streams, strict=False))

    def _first_records(self, n: int, held_out: bool) -> list[dict[str, str]]:
        records = list(islice(self.records(held_out), n))
        require(
            len(records) == n,
            f"{n} {'test' if held_out else 'training'} items are asked for, but digits="
            f"{self.cfg.digits} gives {len(records)}; raise digits or lower the number",
        )
        return records

    def _operation_records(self, operation: str, held_out: bool) -> Iterator[dict[str, str]]:
        """Yields the items of one operation in an order drawn from `split_seed`."""
        digits = self.cfg.digits
        random = random_generator(f"arithmetic {operation}", self.cfg.split_seed)
        for number in random.permutation(10 ** (2 * digits)):
            a, b = (f"{n:0{digits}d}" for n in divmod(number, 10**digits))
            prompt = f"{SYMBOLS[operation]}{a},{b}="
            if _is_held_out(prompt, self.cfg.split_seed) == held_out:
                answer = solve(operation, a, b)
                yield {"prompt": prompt, "answer": answer, "operation": operation}


def _is_held_out(prompt: str, split_seed: int) -> bool:
    digest = hashlib.sha256(f"{split_seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
