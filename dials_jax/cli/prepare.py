"""Tokenises, packs and verifies the corpus of a training configuration, once.

dials prepare --config mdlm/blocks_12 [--data.folder data/openwebtext]

After a stop the same command continues. On a finished folder it verifies every part.
"""

from __future__ import annotations

from dials_jax.commands import CommandLine
from dials_jax.errors import require
from dials_jax.stopping import keeping


def prepare_command() -> None:
    """Prepares or verifies the corpus and prints the counts of its splits."""
    given = CommandLine.read(__doc__, needs_workdir=False)
    from dials_jax.config import CorpusData, TrainConfig
    from dials_jax.data.prepare import prepare_corpus

    config = given.settings(TrainConfig)
    require(isinstance(config.data, CorpusData), "the configuration's data is not a CorpusData")
    require(config.model is not None, "the configuration has no model=; its ids are needed")
    kept = f"finished parts stay in {config.data.folder}; the same command continues after them"
    with keeping(lambda: kept):
        manifest = prepare_corpus(config.data, config.model)
    for name, split in manifest["splits"].items():
        counts = ", ".join(f"{split[unit]:,} {unit}" for unit in ("documents", "tokens", "rows"))
        print(f"{name}: {counts}")
    print(f"{config.data.folder} is complete and verified")
