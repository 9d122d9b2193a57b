"""Routers as one safetensors file, for other tools, and back.

The file holds the float32 arrays of all layers, as `skipping.routed.Router` computes with them:
`norm.scale` [L, D]; `down` [L, D, R] and `down_bias` [L, R]; with a depth above 2 `inner`
[L, depth - 2, R, R] and `inner_bias`; `vote` [L, R, 2] and `vote_bias` [L, 2]. Kernels are
[in, out]; logit 0 is to skip, 1 to execute. The metadata in its header are the fields of
`RouterInfo`, each as JSON: the fingerprint of the model, lambda (`skip_weight`), widths, layers,
fitted thresholds, digests.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from dials_jax import digests, sharding, trees
from dials_jax.config import from_dict, to_dict
from dials_jax.convert.safetensors_reader import open_safetensors, read_metadata
from dials_jax.convert.safetensors_writer import write_safetensors
from dials_jax.errors import require
from dials_jax.files import local_path, parse_json, replacing
from dials_jax.skipping.storage import (
    ROUTER_FORMAT,
    RouterInfo,
    read_routers,
    router_facts,
    router_shapes,
    write_router,
)
from dials_jax.stored import new_folder, require_new, require_parent

SUFFIX_OF_ROUTERS = ".safetensors"
_AGAIN = "copy or export it again"


def export_router(path: str | Path, file: str | Path) -> Path:
    """Writes a router's folder, or the workdir that trained it, as one file, which must not exist.

    Raises: InputError if there is no router, or if it is damaged.
    """
    file = local_path(file, "the router's file")
    require(
        file.suffix == SUFFIX_OF_ROUTERS,
        f"{file} is no name for a router's file; end it with {SUFFIX_OF_ROUTERS}",
    )
    require_parent(file)
    require(not file.exists(), f"{file} exists; name another file")
    folder, info = router_facts(path)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    routers = dict(trees.named_leaves(jax.device_get(read_routers(folder, info, mesh))))
    named = {name.replace("/", "."): np.asarray(x) for name, x in routers.items()}
    about = {name: json.dumps(value) for name, value in to_dict(info).items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named.items()}
    with replacing(file) as out:
        write_safetensors(out, shapes, iter(named.items()), about)
    return file


def import_router(file: str | Path, folder: str | Path) -> RouterInfo:
    """Writes the folder of a router from a file of `export_router`; the folder must not exist.

    Raises: InputError if the file is something else, or damaged.
    """
    file, folder = local_path(file, "SRC"), local_path(folder, "DST")
    require_new(folder)
    named, about = open_safetensors(file), read_metadata(file)
    require(
        about.get("format") == json.dumps(ROUTER_FORMAT),
        f"{file} is no router that this library exported; of a model give the folder",
    )
    facts = {name: parse_json(x, f"{file}: {name}") for name, x in about.items()}
    info = from_dict(RouterInfo, facts, str(file))
    shapes = router_shapes(info)
    names = {name.replace("/", ".") for name, _ in trees.named_leaves(shapes)}
    require(named.keys() == names, f"{file} holds other arrays than a router; {_AGAIN}")
    routers = trees.map_named(lambda name, x: np.array(named[name.replace("/", ".")]), shapes)
    require(
        digests.digest_hex(routers) == info.digests,
        f"{file} is damaged: its arrays do not match their digests; {_AGAIN}",
    )
    with new_folder(folder, _AGAIN) as unfinished:
        write_router(unfinished, routers, info)
    return info
