"""Routers on disk: `config.json` beside the arrays, and the fingerprint of their backbone.

Thresholds that were fitted to a share of the layers stand in `config.json`, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from dials_jax import digests, sharding, trees
from dials_jax.config import RouterConfig, Typed, Votes, from_dict, shown, to_dict, typed
from dials_jax.errors import InputError, require
from dials_jax.files import local_path, read_json, write_json
from dials_jax.keys import seed_key
from dials_jax.skipping.routed import Routed, init_routers, rounded
from dials_jax.stored import MARK, UnreadableTree, load_tree, save_tree, writing

ROUTER_FORMAT = "dials_jax router"
AGAIN = "run its training command again, which writes it from the last checkpoint"


@dataclass(frozen=True, kw_only=True)
class FittedThresholds(Typed):
    """Thresholds with which a router runs a share of the layers: `fit_thresholds` finds them."""

    execution_ratio: float  # the share that was asked for
    votes: Votes
    thresholds: tuple[float, ...]  # of each layer, or one for all
    reached: float  # the share of the layers run on the calibration data
    num_sequences: int  # of the calibration data

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """As `Routed` takes it."""
        return self.thresholds if len(self.thresholds) > 1 else self.thresholds[0]


@dataclass(frozen=True, kw_only=True)
class RouterInfo(Typed):
    """The content of a router folder's `config.json`."""

    format: str = ROUTER_FORMAT
    version: int = 1
    router: RouterConfig
    num_layers: int
    d_model: int
    backbone_fingerprint: str
    skip_weight: float  # the lambda it was trained with
    digests: dict[str, str]  # a path in the routers' arrays to the digest of its bits
    fitted: tuple[FittedThresholds, ...] = ()  # at most one of an execution ratio

    def fitted_to(self, execution_ratio: float, path: str | Path) -> FittedThresholds:
        """Raises: InputError if no thresholds were fitted to this share of the layers."""
        for fitted in self.fitted:
            if fitted.execution_ratio == execution_ratio:
                return fitted
        known = ", ".join(f"{fitted.execution_ratio:g}" for fitted in self.fitted) or "none"
        raise InputError(
            f"router {path} has no thresholds for execution_ratio={execution_ratio:g} (fitted: "
            f"{known}); fit them: its training command with --fit-execution {execution_ratio:g}"
        )


@runtime_checkable
class Backbone(Protocol):
    """The facts about its model that a router stores."""

    mesh: Mesh
    config: Any
    params: trees.Params
    source_fingerprint: str


def save_router(
    folder: str | Path,
    routers: trees.Params,
    cfg: RouterConfig,
    backbone: Backbone,
    skip_weight: float,
) -> None:
    """Writes a folder for `load_router`; `skip_weight` is the lambda it was trained with.

    Raises: InputError if the folder is something else than a router, or cannot be written.
    """
    folder = local_path(folder, "the router's folder")
    info = RouterInfo(
        router=cfg,
        num_layers=backbone.config.num_layers,
        d_model=backbone.config.d_model,
        backbone_fingerprint=backbone.source_fingerprint,
        skip_weight=skip_weight,
        digests=digests.digest_hex(routers),
    )
    write_router(folder, routers, info)


def write_router(folder: Path, routers: trees.Params, info: RouterInfo) -> None:
    """As `save_router`, of a router whose facts are known."""
    require_replaceable_router(folder)
    save_tree(folder / "params", routers, AGAIN)
    _write_info(folder, info)


def save_fitted(path: str | Path, fitted: FittedThresholds) -> None:
    """Writes thresholds into a router's folder, in place of those of the same execution ratio."""
    folder, info = router_facts(path)
    others = [one for one in info.fitted if one.execution_ratio != fitted.execution_ratio]
    found = sorted([*others, fitted], key=lambda one: -one.execution_ratio)
    _write_info(folder, dataclasses.replace(info, fitted=tuple(found)))


def _write_info(folder: Path, info: RouterInfo) -> None:
    with writing(folder, AGAIN):
        sharding.on_first_process(
            lambda: write_json(folder / "config.json", to_dict(info), digest=True)
        )


def require_replaceable_router(folder: Path) -> None:
    """Raises: InputError if `save_router` would overwrite files that it did not make.

    Its own are a router, or the arrays that a stopped save has left.
    """
    if not os.path.lexists(folder):
        return
    config, own = folder / "config.json", False
    if folder.is_dir() and not folder.is_symlink():
        names = [path.name for path in folder.iterdir()]
        with contextlib.suppress(InputError):  # an unreadable config.json
            own = not names or (
                config.exists() and read_json(config).get("format") == ROUTER_FORMAT
            )
        own = own or all(name == MARK or name.startswith("params") for name in names)
    require(own, f"{folder} is no {ROUTER_FORMAT} and would be overwritten; move it away")


def holds_router(path: str | Path) -> bool:
    """Whether `router_facts` finds a router there, and no model beside it."""
    path = local_path(path, "router")
    if (path / "router" / "config.json").exists():
        return not (path / "model").exists()
    config = path / "config.json"
    return config.is_file() and read_json(config).get("format") == ROUTER_FORMAT


def router_facts(path: str | Path) -> tuple[Path, RouterInfo]:
    """The folder of a router, given it or the workdir that trained it, and its config.json.

    Raises: InputError if there is no router.
    """
    path = local_path(path, "router")
    folder = path / "router" if (path / "router" / "config.json").exists() else path
    require(
        (folder / "config.json").exists(),
        f"{path} holds no router; give the workdir of a finished router training",
    )
    facts = read_json(folder / "config.json")
    require(
        facts.get("format") == ROUTER_FORMAT,
        f"{folder} is not a router but {shown(facts.get('format', 'something else'))}; "
        "give the workdir of a finished router training",
    )
    return folder, from_dict(RouterInfo, facts, str(folder / "config.json"))


@typed
def load_router(
    path: str | Path,
    model: Backbone,
    threshold: float | tuple[float, ...] | None = None,
    *,
    votes: Votes | None = None,
    execution_ratio: float | None = None,
) -> Routed:
    """A trained router as a policy for `model`.

    Args:
      threshold: tau, for all layers or one per layer; None keeps the one of training.
      votes: what is counted, see `Routed`; None keeps that of training.
      execution_ratio: takes threshold and votes from those that were fitted to this share of the
        layers.

    Raises: InputError if the router was trained on another backbone, if it is damaged, or if no
      thresholds were fitted to `execution_ratio`.
    """
    folder, info = router_facts(path)
    known = isinstance(model, Backbone)
    require(known, f"model={shown(model)} is no model; give what `load` returns")
    rule = _rule(info, folder, threshold, votes, execution_ratio)
    require(
        digests.same_weights(info.backbone_fingerprint, model.source_fingerprint, str(folder)),
        f"router {folder} belongs to another backbone (fingerprint "
        f"{info.backbone_fingerprint}, this model is {model.source_fingerprint}); "
        "load the model it was trained on, or train a router for this one",
    )
    size = model.config.num_layers, model.config.d_model
    require(
        (info.num_layers, info.d_model) == size,
        f"router {folder} is for {info.num_layers} layers of width {info.d_model}, this model has "
        f"{size[0]} of {size[1]}; {AGAIN}",
    )
    rule.check_threshold(info.num_layers)
    routers = rounded(read_routers(folder, info, model.mesh), model.config.dtype)
    # In the layout of the layers: a slice of a stack would be copied at every layer.
    unrolled = trees.is_unrolled(model.params["layers"])
    return dataclasses.replace(rule, router=trees.unstack(routers) if unrolled else routers)


def read_routers(folder: Path, info: RouterInfo, mesh: Mesh) -> trees.Params:
    """The stored arrays, layers stacked. Raises: InputError if they are missing or damaged."""
    whole = sharding.replicated(mesh)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), router_shapes(info)
    )
    try:
        return load_tree(folder / "params", placed, info.digests)
    except UnreadableTree as error:
        raise InputError(f"router {folder} cannot be read ({error}); {AGAIN}") from error


def router_shapes(info: RouterInfo) -> trees.Params:
    """Shapes of the arrays, layers stacked."""
    shape = info.d_model, info.num_layers, info.router
    return jax.eval_shape(lambda: init_routers(*shape, seed_key(0)))


def _rule(
    info: RouterInfo,
    folder: Path,
    threshold: float | tuple[float, ...] | None,
    votes: Votes | None,
    execution_ratio: float | None,
) -> Routed:
    """The policy that `load_router` is asked for, before its arrays are read."""
    if execution_ratio is None:
        tau = info.router.skip_threshold if threshold is None else threshold
        return Routed(None, tau, votes or info.router.votes)
    require(
        threshold is None and votes is None,
        "execution_ratio= has threshold and votes of its own; give only one of them",
    )
    fitted = info.fitted_to(execution_ratio, folder)
    return Routed(None, fitted.threshold, fitted.votes)
