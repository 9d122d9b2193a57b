"""Writes a model in the layout that its authors publish, or a router as one file.

dials export models/llada-8b --out published/llada-8b
dials export runs/router --out router.safetensors

The folder holds config.json, safetensors and the tokenizer's files. Its weights are those of the
model, bit by bit: the authors' PyTorch code loads them, and `dials convert` brings them back. The
same holds for a router's file.
"""

from __future__ import annotations

from typing import get_args

from dials_jax.cli.options import Options
from dials_jax.config import WeightDtype
from dials_jax.errors import require
from dials_jax.files import local_path
from dials_jax.stopping import keeping


def export_command(argv: list[str] | None = None) -> None:
    """Runs the command; says what was written."""
    given = export_options().read(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # leave the GPU's memory to others
    from dials_jax.convert.router import export_router
    from dials_jax.export import export_model
    from dials_jax.skipping.storage import holds_router

    with keeping(lambda: "what is not whole is not kept; the same command starts again"):
        if holds_router(local_path(given.source, "MODEL")):
            require(given.dtype is None, "--dtype is for models; a router's file is float32")
            size = given.max_shard_size
            require(size is None, "--max-shard-size is for models; a router is one file")
            written = [export_router(given.source, given.out)]
        else:
            sharded = {"max_shard_size": given.max_shard_size} if given.max_shard_size else {}
            folder = export_model(given.source, given.out, given.dtype, **sharded)
            written = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in written)
    print(f"{given.out}: {', '.join(file.name for file in written)}; {size / 1e9:.3g} GB")


def export_options() -> Options:
    parser = Options("export", __doc__)
    parser.add_argument(
        "source", metavar="MODEL", help="a model, a training's workdir, a router, or a download"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; of a router a .safetensors"
    )
    parser.add_argument(
        "--dtype", choices=get_args(WeightDtype), help="of the written weights; default: as stored"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file; default: 5GB")
    return parser
