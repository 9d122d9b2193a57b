"""Tokenises, packs and verifies the corpus of a training configuration, once.

python prepare.py --config configs/mdlm/blocks_12.py [--data.folder data/openwebtext]

After a stop the same command continues. On a finished folder it verifies every part.
"""

from dials_jax.commands import parse, run_command
from dials_jax.config import CorpusData, TrainConfig
from dials_jax.data.prepare import prepare_corpus
from dials_jax.errors import require
from dials_jax.stopping import keeping


def command() -> None:
    """Prepares or verifies the corpus and prints the counts of its splits."""
    config, _ = parse(TrainConfig, __doc__, needs_workdir=False)
    require(isinstance(config.data, CorpusData), "the configuration's data is not a CorpusData")
    require(config.model is not None, "the configuration has no model=; its ids are needed")
    kept = f"finished parts stay in {config.data.folder}; the same command continues after them"
    with keeping(lambda: kept):
        manifest = prepare_corpus(config.data, config.model)
    for name, split in manifest["splits"].items():
        counts = ", ".join(f"{split[unit]:,} {unit}" for unit in ("documents", "tokens", "rows"))
        print(f"{name}: {counts}")
    print(f"{config.data.folder} is complete and verified")


if __name__ == "__main__":
    run_command(command)
