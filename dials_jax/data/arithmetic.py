"""The procedural task of the demo: operations on a few digits, in characters.

    add      +37,58=   095    carries: a digit depends on those to its right
    reverse  r37,58=   8573   moves digits
    max      >37,58=   58     compares, then copies
    sort     s37,58=   3578   every digit depends on all

All prompts have one length, and so have the answers of each operation. The operations differ in
difficulty, so decisions per sequence make a difference. Sums take several times as long to learn
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
HELD_OUT_ONE_IN = 10  # one of this many prompts is for testing


def solve(operation: str, a: str, b: str) -> str:
    """The answer for two operands of equally many digits."""
    if operation == "add":
        return f"{int(a) + int(b):0{len(a) + 1}d}"
    if operation == "max":
        return max(a, b)
    return (a + b)[::-1] if operation == "reverse" else "".join(sorted(a + b))


class ArithmeticTask:
    """Items of the chosen operations, split into training and test by a hash of the prompt.

    Raises: InputError for an unknown operation, or for more digits or items than exist.
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
        return character_tokenizer("0123456789,=" + "".join(SYMBOLS.values()))

    @property
    def prompt_length(self) -> int:
        return 2 * self.cfg.digits + 3  # symbol, comma and equals sign

    @property
    def answer_length(self) -> int:
        return max(2 * self.cfg.digits, self.cfg.digits + 1) + 1  # end of text included

    @functools.cached_property
    def train(self) -> TaskRows:
        """`num_items` distinct rows, equally many of each operation."""
        records = self._first(self.cfg.num_items, held_out=False)
        texts = [text for r in records for text in (r["prompt"], r["answer"])]
        ids = self.tokenizer.encode_batch(texts)
        return TaskRows(
            pairs=list(zip(ids[::2], ids[1::2], strict=True)),
            prompt_length=self.prompt_length,
            answer_length=self.answer_length,
            eos_id=self.tokenizer.token_to_id("[EOS]"),
            pad_id=self.tokenizer.token_to_id("[PAD]"),
        )

    def test_records(self, n: int = 1000) -> list[dict[str, str]]:
        """`n` items that no training set of this `split_seed` contains: prompt, answer, operation.

        The first n of a larger n are the same items.
        """
        return self._first(n, held_out=True)

    def records(self, held_out: bool) -> Iterator[dict[str, str]]:
        """Every item of one side of the split, alternating between operations."""
        sides = [self._side(operation, held_out) for operation in self.cfg.operations]
        # Not strict: the shortest side ends them all, so that operations stay balanced.
        return chain.from_iterable(zip(*sides, strict=False))

    def _first(self, n: int, held_out: bool) -> list[dict[str, str]]:
        records = list(islice(self.records(held_out), n))
        require(
            len(records) == n,
            f"{n} {'test' if held_out else 'training'} items are asked for, but digits="
            f"{self.cfg.digits} gives {len(records)}; raise digits or lower the number",
        )
        return records

    def _side(self, operation: str, held_out: bool) -> Iterator[dict[str, str]]:
        """All items of one operation and side, in an order drawn from `split_seed`."""
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
