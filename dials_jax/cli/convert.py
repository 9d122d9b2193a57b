"""Converts a published checkpoint (config.json and safetensors) to a model folder.

dials convert LLaDA-8B-Base models/llada-8b
dials convert last.ckpt models/mdlm --allow-pickle
dials convert router.safetensors runs/router
dials convert models/llada-8b models/llada-8b-fp8 --weights fp8

A model folder loads onto many devices, with its digests checked. Converting needs neither PyTorch
nor a GPU, and memory for one layer at a time. A Lightning checkpoint of MDLM (*.ckpt) needs PyTorch
and --allow-pickle. A router's file (*.safetensors, of `dials export`) becomes its folder again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dials_jax.cli.options import Options
from dials_jax.config import EightBits, ModelConfig, WeightDtype
from dials_jax.errors import require
from dials_jax.files import local_path
from dials_jax.stopping import keeping

# Those of `hugging_face.MODEL_TYPES`, which --help does not wait for.
CONVERTED_TYPES = ("llada", "illada", "Dream", "sdar", "Fast_dLLM_Qwen", "qwen2", "mdlm", "gpt2")
OF_CHECKPOINTS = ("allow_pickle", "ema", "mask_id", "eos_id")


def convert_command(argv: list[str] | None = None) -> None:
    """Runs the command; says what was written."""
    given = convert_options().read(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # leave the GPU's memory to others
    with keeping(lambda: "what is not whole is not kept; the same command starts again"):
        made = convert_source(given)
    print(f"{given.target}: {made}")


def convert_options() -> Options:
    parser = Options("convert", __doc__)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and *.safetensors, a .ckpt, or a router's file; with "
        "--weights also a folder of this library",
    )
    parser.add_argument("target", metavar="DST", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=get_args(WeightDtype),
        help="of the written weights; default: bfloat16 if all of SRC is, otherwise float32",
    )
    parser.add_argument(
        "--weights",
        choices=get_args(EightBits),
        help="store layers and head in 8 bits, at half the size of bfloat16",
    )
    group = parser.add_argument_group("of a .ckpt")
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        default=None,
        help="read it although it is a pickle; only its weights are unpickled, no code is run",
    )
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the averaged weights (the default), or those of the last step",
    )
    group.add_argument(
        "--mask-id", type=int, metavar="N", help="the id of [MASK], if the tokenizer is not known"
    )
    group.add_argument(
        "--eos-id", type=int, metavar="N", help="the id of the end of text, given with --mask-id"
    )
    parser.epilog = f"Model types of config.json that convert: {', '.join(CONVERTED_TYPES)}."
    return parser


def convert_source(given: argparse.Namespace) -> str:
    """Converts what SRC is, as the options ask; returns what it is in a few words.

    Raises: InputError before SRC is read for an option that has no meaning for it, and for a
      folder DST that exists or cannot be made.
    """
    from dials_jax.convert import lightning
    from dials_jax.convert.router import SUFFIX_OF_ROUTERS, import_router
    from dials_jax.stored import require_new

    source = local_path(given.source, "SRC")
    require_new(local_path(given.target, "DST"))
    options = {name: getattr(given, name) for name in OF_CHECKPOINTS}
    options = {name: value for name, value in options.items() if value is not None}
    if source.suffix == lightning.SUFFIX:
        return described(convert_checkpoint(source, given, options), given.weights)
    names = [f"no-{name}" if value is False else name for name, value in options.items()]
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    hint = "; write mask_token_id into config.json" if "mask_id" in options else ""
    require(not flags, f"{flags} is for a .ckpt, and {given.source} is none; leave it out{hint}")
    if source.suffix == SUFFIX_OF_ROUTERS:
        require(given.dtype is None, "--dtype is for models; a router is float32")
        require(given.weights is None, "--weights is for models; a router is float32")
        info = import_router(source, given.target)
        return f"router, {info.num_layers} layers of width {info.d_model}"
    from dials_jax.convert.hugging_face import convert_folder, quantise_folder
    from dials_jax.models.folders import is_model_folder

    convert, own = convert_folder, [x for x in (source, source / "model") if is_model_folder(x)]
    if own and given.weights:
        convert, source = quantise_folder, own[0]
    return described(convert(source, given.target, given.dtype, given.weights), given.weights)


def convert_checkpoint(
    source: Path, given: argparse.Namespace, options: dict[str, object]
) -> ModelConfig:
    """Converts a Lightning checkpoint."""
    from dials_jax.convert.hugging_face import write_model_folder
    from dials_jax.convert.lightning import open_lightning

    opened = open_lightning(source, given.dtype, **options)
    return write_model_folder(given.target, *opened, source.parent, given.weights)


def described(cfg: ModelConfig, weights: EightBits | None) -> str:
    eight_bits = f", weights in {weights}" if weights else ""
    return f"{cfg.model_type}, {cfg.num_layers} layers, {cfg.dtype}{eight_bits}"
