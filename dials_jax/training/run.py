"""What a training configuration stands for: data, loss, initial values, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dials_jax import trees
from dials_jax.config import (
    InputError,
    TrainConfig,
    from_dict,
    read_json,
    require,
    to_dict,
    write_json,
)
from dials_jax.data.batches import TrainingData
from dials_jax.data.sources import training_data
from dials_jax.keys import seed_key
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.checkpoint import save_model
from dials_jax.models.model import Model
from dials_jax.sharding import on_first_process
from dials_jax.skipping.router import init_routers
from dials_jax.skipping.storage import save_router
from dials_jax.training.losses import LossFn, check_objective, model_loss, router_loss
from dials_jax.training.source import grow_vocabulary, load_source

# Settings that may change between one part of a run and the next. Those of data say where rows are
# found; that they are the same rows, the data's fingerprint says.
FREE_FIELDS = tuple(
    f"train.{name}"
    for name in (
        *("log_every", "save_every", "keep_checkpoints", "mesh", "remat", "max_minutes"),
        *(f"data.{place}" for place in ("folder", "paths", "cache", "tokenizer", "reader")),
    )
)


@dataclass(frozen=True)
class Run:
    """One kind of training, ready for the loop.

    Attributes:
      init: makes the first parameters from the arrays of `source`.
      frozen: parameters that the loss reads and nothing changes.
      prefix: of the trained parameters in the sharding table.
      export: writes what the run is for into the workdir.
    """

    data: TrainingData
    loss_fn: LossFn
    init: Callable[..., trees.Params]
    frozen: trees.Params
    prefix: str
    identity: dict[str, Any]
    export: Callable[[Path, trees.Params], None]
    source: tuple = ()


def prepare(cfg: TrainConfig, mesh: Mesh) -> Run:
    """Loads and checks all that a run needs, before anything expensive."""
    return _router_run(cfg, mesh) if cfg.backbone else _model_run(cfg, mesh)


def _model_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    check_objective(cfg.model, cfg.objective)
    data, tokenizer = training_data(cfg.data, cfg.model)
    identity, source = {"data_fingerprint": data.fingerprint}, ()
    if cfg.init_from:
        model = load_source(cfg.init_from, cfg.model, mesh)
        identity["source_fingerprint"], source = model.fingerprint, (model.params,)

    def init(*source: trees.Params) -> trees.Params:
        if source:
            params = grow_vocabulary(*source, cfg.model.vocab_size)
        else:
            params = transformer.init(cfg.model, seed_key(cfg.seed))
        return unroll(params) if cfg.unrolled else params

    def export(workdir: Path, params: trees.Params) -> None:
        on_first_process(lambda: tokenizer.save(workdir))
        files = [workdir / "tokenizer.json"]
        save_model(workdir / "model", cfg.model, params, tokenizer_files=files, overwrite=True)

    return Run(
        data=data,
        loss_fn=model_loss(cfg.model, cfg.objective, cfg.remat, cfg.dropout),
        init=init,
        frozen={},
        prefix="",
        identity=identity,
        export=export,
        source=source,
    )


def unroll(params: trees.Params) -> trees.Params:
    """The same parameters with own arrays for each layer.

    A scan copies every layer's weights out of the stack, and what the backward pass needs into
    another: a fifth of a small model's step.
    """
    return {**params, "layers": trees.unstack(params["layers"])}


def _router_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    backbone: Model = load(cfg.backbone, mesh=mesh, layout="stacked")
    check_objective(backbone.config, cfg.objective, routers=True)
    data, _ = training_data(cfg.data, backbone.config, backbone.path)
    d_model, num_layers = backbone.config.d_model, backbone.config.num_layers

    def export(workdir: Path, routers: trees.Params) -> None:
        folder = workdir / "router"
        save_router(folder, routers, cfg.router, backbone, cfg.objective.skip_weight)

    return Run(
        data=data,
        loss_fn=router_loss(backbone.config, cfg.router, cfg.objective, cfg.remat),
        init=lambda: init_routers(d_model, num_layers, cfg.router, seed_key(cfg.seed)),
        frozen=backbone.params,
        prefix="routers/",
        identity={
            "data_fingerprint": data.fingerprint,
            "backbone_fingerprint": backbone.fingerprint,
        },
        export=export,
    )


def claim_workdir(workdir: Path, cfg: TrainConfig, identity: dict[str, Any]) -> None:
    """Writes `config.json`, or checks that the workdir holds this very experiment.

    Raises: InputError naming the first setting that differs.
    """
    path = workdir / "config.json"
    mine = {"train": to_dict(cfg), **identity}
    if path.exists():
        theirs = read_json(path)
        try:  # a setting that is newer than the run had its default
            theirs["train"] = to_dict(from_dict(TrainConfig, theirs.get("train", {})))
        except InputError as error:
            raise InputError(
                f"{workdir} holds another experiment ({error}); choose another --workdir"
            ) from error
        for name, (old, new) in _differences(theirs, mine).items():
            require(
                name.startswith(FREE_FIELDS),
                f"{workdir} holds another experiment ({name.removeprefix('train.')} is {old!r} "
                f"there and {new!r} here); choose another --workdir",
            )
    if jax.process_index() == 0:
        write_json(path, mine)


def _differences(a: Any, b: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = {}
        for key in {**b, **a}:
            found |= _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if a == b or trees.same_weights(a, b, name) else {name: (a, b)}
