"""Model schedules: which model takes which denoising steps.

Source: Sedykh et al. 2026, "Not All Denoising Steps Are Equal", section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

from dials_jax.config import Range, Typed, as_type, shown, typed
from dials_jax.errors import require

StepCount = Annotated[int, Range(1, 10_000_000)]  # every one of them is written out as a letter


@dataclass(frozen=True)
class Schedule(Typed):
    """Runs of steps, each taken by the model of one letter; the first run sees the most noise.

    `L125,H750,L125` is 125 steps of L, 750 of H and 125 of L. `str` gives back this text.

    Attributes:
      segments: (letter, steps) of every run.
    """

    segments: tuple[tuple[str, int], ...]

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.segments), "a schedule is empty; give one such as L125,H750,L125")
        for letter, steps in self.segments:
            require(
                len(letter) == 1 and letter.isalpha() and steps > 0,
                f"schedule segment {letter[:20]}{steps}: give one letter and a positive number of "
                "steps",
            )

    @classmethod
    @typed
    def parse(cls, text: str) -> Schedule:
        """From text such as `L125,H750,L125`.

        Raises: InputError for text of another form.
        """
        segments = []
        for part in text.split(","):
            found = re.fullmatch(r"\s*([A-Za-z])([0-9]{1,9})\s*", part)
            require(
                found is not None,
                f"schedule {shown(text)}: {shown(part.strip())} is not a letter and a number of "
                "steps, as in L125,H750,L125",
            )
            segments.append((found[1], int(found[2])))
        return cls(tuple(segments))

    def __str__(self) -> str:
        return ",".join(f"{letter}{steps}" for letter, steps in self.segments)

    @classmethod
    @typed
    def of_steps(cls, letters: Iterable[str]) -> Schedule:
        """From the letter of every step; equal neighbours make one run."""
        if not isinstance(letters, str):
            letters = as_type(tuple[str, ...], letters, "letters")
        return cls(tuple((letter, len(list(run))) for letter, run in groupby(letters)))

    @classmethod
    @typed
    def sandwich(
        cls, steps: StepCount, light_steps: int | float, light: str = "L", heavy: str = "H"
    ) -> Schedule:
        """Light steps at both ends, half of them each; an odd one comes first.

        Args:
          light_steps: how many (an integer), or which fraction of all (a float).
        """
        _require_letters(light, heavy)
        count = _count(steps, light_steps)
        ends = count - count // 2, count // 2
        return cls.of_steps(light * ends[0] + heavy * (steps - count) + light * ends[1])

    @classmethod
    @typed
    def quarter(cls, number: int, steps: StepCount, light: str = "L", heavy: str = "H") -> Schedule:
        """Light steps in one quarter, the first (most noise) to the fourth."""
        require(1 <= number <= 4, f"quarter {number} does not exist; give 1 to 4")
        return cls.coarse(4, (number - 1,), steps, light, heavy)

    @classmethod
    @typed
    def coarse(
        cls,
        num_segments: StepCount,
        chosen: Iterable[int],
        steps: StepCount,
        light: str = "L",
        heavy: str = "H",
    ) -> Schedule:
        """Light steps in the chosen ones of equal segments; 0 is the one of most noise.

        Raises: InputError for steps that do not split evenly, or segments that do not exist.
        """
        _require_letters(light, heavy)
        listed = list(chosen) if isinstance(chosen, set | frozenset) else chosen
        chosen = set(as_type(tuple[int, ...], listed, "chosen"))
        require(
            steps % num_segments == 0,
            f"steps={steps} do not split into {num_segments} equal segments; give a multiple",
        )
        for segment in chosen:
            require(
                0 <= segment < num_segments,
                f"segment {segment} does not exist; they count from 0 to {num_segments - 1}",
            )
        each = steps // num_segments
        runs = [(light if i in chosen else heavy) * each for i in range(num_segments)]
        return cls.of_steps("".join(runs))

    @property
    def num_steps(self) -> int:
        return sum(steps for _, steps in self.segments)

    @property
    def letters(self) -> tuple[str, ...]:
        """The models it names, in the order of their first steps."""
        return tuple(dict.fromkeys(letter for letter, _ in self.segments))

    @property
    def each_step(self) -> str:
        """The letter of every step."""
        return "".join(letter * steps for letter, steps in self.segments)

    def ends(self) -> list[tuple[str, int]]:
        """The letter of every run, and the number of the first step after it.

        Neighbours of one letter are one run: L5,L5 does what L10 does.
        """
        ends, stop = [], 0
        for letter, steps in Schedule.of_steps(self.each_step).segments:
            stop += steps
            ends.append((letter, stop))
        return ends

    def share(self, letter: str) -> float:
        """The share of steps that a model takes."""
        return self.each_step.count(letter) / self.num_steps


def _require_letters(*letters: str) -> None:
    for letter in letters:
        require(len(letter) == 1 and letter.isalpha(), f"{shown(letter)} is no letter of a model")


def _count(steps: int, light_steps: int | float) -> int:
    if isinstance(light_steps, float):
        require(0 <= light_steps <= 1, f"light_steps={light_steps}: a fraction lies in [0, 1]")
        return round(light_steps * steps)
    require(0 <= light_steps <= steps, f"light_steps={light_steps} must lie in 0 to {steps}")
    return light_steps
