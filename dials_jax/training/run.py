"""What a training configuration stands for: data, loss, initial values, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dials_jax import trees
from dials_jax.config import TrainConfig, read_json, require, to_dict, write_json
from dials_jax.data.batches import TrainingData
from dials_jax.data.sources import training_data
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.checkpoint import save_model
from dials_jax.models.model import Model
from dials_jax.sharding import on_first_process
from dials_jax.skipping.router import init_routers
from dials_jax.skipping.storage import save_router
from dials_jax.training.losses import LossFn, model_loss, router_loss

# Settings that may change between one part of a run and the next.
FREE_FIELDS = tuple(
    f"train.{name}" for name in ("log_every", "save_every", "keep_checkpoints", "mesh", "remat")
)


@dataclass(frozen=True)
class Run:
    """One kind of training, ready for the loop.

    Attributes:
      frozen: parameters that the loss reads and nothing changes.
      prefix: of the trained parameters in the sharding table.
      export: writes what the run is for into the workdir.
    """

    data: TrainingData
    loss_fn: LossFn
    init: Callable[[], trees.Params]
    frozen: trees.Params
    prefix: str
    identity: dict[str, Any]
    export: Callable[[Path, trees.Params], None]


def prepare(cfg: TrainConfig, mesh: Mesh) -> Run:
    """Loads and checks all that a run needs, before anything expensive."""
    return _router_run(cfg, mesh) if cfg.backbone else _model_run(cfg)


def _model_run(cfg: TrainConfig) -> Run:
    data, tokenizer = training_data(cfg.data, cfg.model)

    def export(workdir: Path, params: trees.Params) -> None:
        on_first_process(lambda: tokenizer.save(workdir))
        files = [workdir / "tokenizer.json"]
        save_model(workdir / "model", cfg.model, params, tokenizer_files=files, overwrite=True)

    return Run(
        data=data,
        loss_fn=model_loss(cfg.model, cfg.objective, cfg.remat),
        init=lambda: transformer.init(cfg.model, jax.random.key(cfg.seed)),
        frozen={},
        prefix="",
        identity={"data_fingerprint": data.fingerprint},
        export=export,
    )


def _router_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    backbone: Model = load(cfg.backbone, mesh=mesh, layout="stacked")
    data, _ = training_data(cfg.data, backbone.config, backbone.path)
    d_model, num_layers = backbone.config.d_model, backbone.config.num_layers

    def export(workdir: Path, routers: trees.Params) -> None:
        folder = workdir / "router"
        save_router(folder, routers, cfg.router, backbone, cfg.objective.skip_weight)

    return Run(
        data=data,
        loss_fn=router_loss(backbone.config, cfg.router, cfg.objective, cfg.remat),
        init=lambda: init_routers(d_model, num_layers, cfg.router, jax.random.key(cfg.seed)),
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
        for name, (old, new) in _differences(read_json(path), mine).items():
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
    return {} if a == b else {name: (a, b)}
