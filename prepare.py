"""Prepares the corpus that a training configuration reads: tokenised, packed and verified, once.

python prepare.py --config configs/mdlm/blocks_12.py [--data.folder data/openwebtext]

Stopped, it continues with the same command. With all done, it verifies the folder.
"""

from dials_jax.commands import parse, run_command
from dials_jax.config import CorpusData, TrainConfig
from dials_jax.data.prepare import prepare_corpus
from dials_jax.errors import require
from dials_jax.stopping import keeping


def command() -> None:
    config, _ = parse(TrainConfig, __doc__, needs_workdir=False)
    require(isinstance(config.data, CorpusData), "the configuration's data is no CorpusData")
    require(config.model is not None, "the configuration has no model=; its ids are needed")
    kept = f"finished parts stay in {config.data.folder}; the same command continues after them"
    with keeping(lambda: kept):
        manifest = prepare_corpus(config.data, config.model)
    for name, split in manifest["splits"].items():
        counts = ", ".join(f"{split[what]:,} {what}" for what in ("documents", "tokens", "rows"))
        print(f"{name}: {counts}")
    print(f"{config.data.folder} is complete and verified")


if __name__ == "__main__":
    run_command(command)
