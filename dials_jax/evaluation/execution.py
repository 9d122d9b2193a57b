"""Which layers ran, by layer and by how much of the answer was still masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

NUM_BINS = 10  # equal bins of the mask ratio over (0, 1]


class Execution:
    """Counts of layer runs. Model calls on sequences without a masked token are left out."""

    def __init__(self, num_layers: int):
        self.executed = np.zeros((NUM_BINS, num_layers), np.int64)
        self.rows = np.zeros(NUM_BINS, np.int64)

    def add(
        self, gates: Bool[np.ndarray, "*S L R"], masked_share: Float[np.ndarray, "*S _"]
    ) -> None:
        """Adds model calls; under guidance R counts both halves and the shares repeat."""
        repeats = gates.shape[-1] // masked_share.shape[-1]
        share = np.concatenate([masked_share] * repeats, axis=-1).reshape(-1)
        by_row = np.moveaxis(gates, -2, -1).reshape(share.size, -1)
        bins = np.ceil(share * NUM_BINS - 1e-6).astype(int) - 1
        np.add.at(self.executed, bins[bins >= 0], by_row[bins >= 0])
        np.add.at(self.rows, bins[bins >= 0], 1)

    def add_counts(self, executed: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Adds the counts of another `Execution`, from its `to_dict`."""
        self.executed += np.asarray(executed)
        self.rows += np.asarray(rows)

    def to_dict(self) -> dict[str, Any]:
        return {"executed": self.executed.tolist(), "rows": self.rows.tolist()}
