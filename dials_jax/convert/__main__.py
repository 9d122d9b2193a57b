"""Converts a published checkpoint: `dials convert SRC DST`, or `python -m convert`.

What converts is imported once the options are read, so that --help waits for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from dials_jax.config import ModelConfig, WeightDtype
from dials_jax.errors import InputError, require
from dials_jax.files import local_path
from dials_jax.stopping import Stopped, keeping, obey_sigterm

DESCRIPTION = """Convert a Hugging Face folder (config.json and safetensors) to a dials_jax model
folder, which loads onto many devices and with its digests checked. Needs neither PyTorch nor a GPU,
and memory for one layer at a time. A Lightning checkpoint of MDLM (*.ckpt) needs PyTorch and
--allow-pickle. A router's file (*.safetensors, of `dials export`) becomes its folder again."""

# Those of `hugging_face.MODEL_TYPES`, which --help does not wait for.
CONVERTED_TYPES = ("llada", "illada", "Dream", "sdar", "Fast_dLLM_Qwen", "qwen2", "mdlm", "gpt2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status.

    0: done. 2: wrong input, after one line about it. 130 and 143: Ctrl-C and SIGTERM.
    """
    parser = argparse.ArgumentParser(prog="dials convert", description=DESCRIPTION)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and *.safetensors, a .ckpt, or a router's file",
    )
    parser.add_argument("target", metavar="DST", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=get_args(WeightDtype),
        help="of the written weights; default: bfloat16 if all of SRC is, otherwise float32",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a .ckpt, which is a pickle; only its weights are unpickled, no code is run",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a .ckpt: the averaged weights, or those of the last step",
    )
    parser.add_argument(
        "--mask-id",
        type=int,
        metavar="N",
        help="of a .ckpt: the id of [MASK], for a tokenizer that is not known",
    )
    parser.add_argument(
        "--eos-id",
        type=int,
        metavar="N",
        help="of a .ckpt: the id of the end of text, given with --mask-id",
    )
    parser.epilog = f"Model types of config.json that convert: {', '.join(CONVERTED_TYPES)}."
    options = parser.parse_args(arguments)
    import jax

    jax.config.update("jax_platforms", "cpu")  # leave the GPU's memory to others
    obey_sigterm()
    try:
        with keeping(lambda: "what is not whole is not kept; the same command starts again"):
            made = convert_source(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped: {stop.message}", file=sys.stderr)
        return stop.status
    print(f"{options.target}: {made}")
    return 0


def convert_source(options: argparse.Namespace) -> str:
    """Converts what SRC is, as the options ask; returns what it is in a few words."""
    from dials_jax.convert.router import SUFFIX_OF_ROUTERS, import_router

    source = local_path(options.source, "SRC")
    local_path(options.target, "DST")
    if source.suffix == SUFFIX_OF_ROUTERS:
        info = import_router(source, options.target)
        return f"router, {info.num_layers} layers of width {info.d_model}"
    cfg = convert_model(source, options)
    return f"{cfg.model_type}, {cfg.num_layers} layers, {cfg.dtype}"


def convert_model(source: Path, options: argparse.Namespace) -> ModelConfig:
    """Converts a Hugging Face folder or a Lightning checkpoint."""
    from dials_jax.convert import lightning
    from dials_jax.convert.hugging_face import convert_folder, write_model_folder

    if source.suffix != lightning.SUFFIX:
        require(
            options.mask_id is None and options.eos_id is None,
            "--mask-id and --eos-id are for a .ckpt; write mask_token_id into config.json",
        )
        return convert_folder(source, options.target, options.dtype)
    opened = lightning.open_lightning(
        source,
        options.dtype,
        allow_pickle=options.allow_pickle,
        ema=options.ema,
        mask_id=options.mask_id,
        eos_id=options.eos_id,
    )
    return write_model_folder(options.target, *opened, source.parent)


if __name__ == "__main__":
    sys.exit(main())
