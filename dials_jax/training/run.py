"""Makes a run of a training configuration: its data, loss, first parameters and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dials_jax import trees
from dials_jax.compiling import require_32_bits
from dials_jax.config import (
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from dials_jax.data.batches import TrainingData
from dials_jax.data.sources import load_training_data, tokenizer_descriptions
from dials_jax.errors import InputError, require
from dials_jax.files import write_json
from dials_jax.keys import seed_key
from dials_jax.loading import load
from dials_jax.models import folders, transformer
from dials_jax.models.folders import save_model
from dials_jax.models.model import Model
from dials_jax.nn.kernels.implementation import check_kernel_choice
from dials_jax.sharding import on_first_process
from dials_jax.skipping import storage
from dials_jax.skipping.routed import init_routers
from dials_jax.skipping.storage import save_router
from dials_jax.stored import writing
from dials_jax.training.losses import LossFn, check_objective, model_loss, router_loss
from dials_jax.training.optimizer import make_lr_schedule, num_steps
from dials_jax.training.source import grow_vocabulary, load_source, require_trainable
from dials_jax.training.thresholds import fit_thresholds
from dials_jax.training.validation import Score, Validation, model_score, router_score
from dials_jax.workdir import differences, read_mark, require_unclaimed

PLACES = ("folder", "paths", "cache", "tokenizer", "reader")  # of data: where its rows are
# Settings that may change when a run continues. Those of data say where the rows are; the data's
# fingerprint says that they are the same rows. The models that a run starts from have fingerprints
# as well.
FREE_FIELDS = tuple(
    f"train.{name}"
    for name in (
        *("log_every", "save_every", "keep_checkpoints", "mesh", "remat", "max_minutes"),
        "keep_models_at",
        *("num_microbatches", "layout", "backbone", "init_from", "fit_execution"),
        *("validation", "validate_every", "validation_batches", "validation_thresholds"),
        *(f"data.{place}" for place in PLACES),
    )
)
# These have no effect where a model is trained.
ROUTER_FIELDS = (
    "train.router",
    *(f"train.objective.{name}" for name in ("skip_weight", "target_skip_rate", "scale_skip")),
)
# Of these only the resulting learning rates matter.
RATE_FIELDS = tuple(
    f"train.optimizer.{name}"
    for name in (
        *("learning_rate", "lr_schedule", "final_scale"),
        *(f"{what}_{unit}" for what in ("num", "warmup") for unit in ("steps", "epochs")),
    )
)
EXPERIMENT = "config.json"  # in a workdir of training: its settings, and what else it depends on
# What training writes beside it.
OUTPUTS = ("checkpoints", "metrics.jsonl", "tensorboard", "training.png", "steps")


@dataclass(frozen=True)
class Trainee:
    """A model or routers to train. It is made without data and without stored weights.

    Attributes:
      init: makes the first parameters; `init(source)` makes them from those of another model.
      prefix: of the names of the trained parameters in the sharding table.
      score: the metrics of held-out data.
    """

    loss_fn: LossFn
    init: Callable[..., trees.Params]
    prefix: str
    score: Score


@dataclass(frozen=True, kw_only=True)
class Run(Trainee):
    """One training, ready for the loop.

    Attributes:
      identity: the fingerprints of the data and of the models that the run starts from.
      frozen: parameters that the loss reads and training does not change.
      export: writes the result of the training into the workdir.
      source: arrays that `init` makes the parameters from.
      validation: scores held-out data; None: there is none.
      backbone: the frozen model that routers are trained on.
    """

    data: TrainingData
    frozen: trees.Params
    identity: dict[str, Any]
    export: Callable[[Path, trees.Params], None]
    source: tuple = ()
    validation: Validation | None = None
    backbone: ModelConfig | None = None


def make_trainee(cfg: TrainConfig, backbone: ModelConfig | None = None) -> Trainee:
    """Returns the routers to train on a frozen `backbone`, or without one the model to train.

    Raises: InputError for an objective that does not fit the model.
    """
    if backbone is not None:
        check_objective(backbone, cfg.objective, routers=True)
        shape = backbone.d_model, backbone.num_layers
        return Trainee(
            router_loss(backbone, cfg.router, cfg.objective, cfg.remat),
            make_router_init(*shape, cfg.router, cfg.seed),
            "routers/",
            router_score(backbone, cfg.router, cfg.objective, cfg.validation_thresholds),
        )
    check_objective(cfg.model, cfg.objective)
    return Trainee(
        model_loss(cfg.model, cfg.objective, cfg.remat, cfg.dropout),
        make_model_init(cfg.model, cfg.seed, cfg.layout),
        "",
        model_score(model_loss(cfg.model, cfg.objective, remat=False)),
    )


@lru_cache(maxsize=16)  # as `make_train_step`
def make_router_init(
    d_model: int, num_layers: int, cfg: RouterConfig, seed: int
) -> Callable[[], trees.Params]:
    """Returns the function that makes the first parameters of routers."""
    return lambda: init_routers(d_model, num_layers, cfg, seed_key(seed))


@lru_cache(maxsize=16)
def make_model_init(cfg: ModelConfig, seed: int, layout: str) -> Callable[..., trees.Params]:
    """Returns the function that makes the first parameters of a model."""

    def init(*source: trees.Params) -> trees.Params:
        if source:
            params = grow_vocabulary(*source, cfg.vocab_size)
        else:
            params = transformer.init(cfg, seed_key(seed))
        return unroll(params) if layout == "unrolled" else params

    return init


def prepare_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    """Loads and checks everything that a run needs, before anything expensive."""
    require_32_bits()
    check_kernel_choice()
    return _router_run(cfg, mesh) if cfg.backbone else _model_run(cfg, mesh)


def _model_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    trainee = make_trainee(cfg)
    data, tokenizer = load_training_data(cfg.data, cfg.model)
    identity, source = {"data_fingerprint": data.fingerprint}, ()
    if cfg.init_from:
        model = load_source(cfg.init_from, cfg.model, mesh)
        identity["source_fingerprint"], source = model.fingerprint, (model.params,)

    def export(workdir: Path, params: trees.Params) -> None:
        with writing(workdir / "tokenizer.json", "make room and run the same command again"):
            on_first_process(lambda: tokenizer.save(workdir))
        files = [workdir / "tokenizer.json", *tokenizer_descriptions(cfg.data)]
        save_model(workdir / "model", cfg.model, params, tokenizer_files=files, overwrite=True)

    return Run(
        **vars(trainee),
        data=data,
        frozen={},
        identity=identity,
        export=export,
        source=source,
        validation=_open_validation(cfg, mesh, trainee, data, cfg.model),
    )


def unroll(params: trees.Params) -> trees.Params:
    """Gives every layer arrays of its own.

    With stacked arrays, a scan copies the weights of each layer out of the stack, and activations
    for the backward pass into another: a fifth of the time of a small model's step.
    """
    return {**params, "layers": trees.unstack(params["layers"])}


def _router_run(cfg: TrainConfig, mesh: Mesh) -> Run:
    backbone: Model = load(cfg.backbone, mesh=mesh, layout=cfg.layout)
    require_trainable(backbone, "backbone", cfg.backbone)
    trainee = make_trainee(cfg, backbone.config)
    data, _ = load_training_data(cfg.data, backbone.config, backbone.path)

    def export(workdir: Path, routers: trees.Params) -> None:
        folder = workdir / "router"
        save_router(folder, routers, cfg.router, backbone, cfg.objective.skip_weight)
        for ratio in cfg.fit_execution:
            fit_thresholds(folder, backbone, cfg.validation, ratio, objective=cfg.objective)

    return Run(
        **vars(trainee),
        data=data,
        frozen=backbone.params,
        identity={
            "data_fingerprint": data.fingerprint,
            "backbone_fingerprint": backbone.fingerprint,
        },
        export=export,
        validation=_open_validation(cfg, mesh, trainee, data, backbone.config, backbone.path),
        backbone=backbone.config,
    )


def _open_validation(
    cfg: TrainConfig,
    mesh: Mesh,
    trainee: Trainee,
    data: TrainingData,
    model: ModelConfig,
    model_folder: str = "",
) -> Validation | None:
    """Raises: InputError for held-out data that does not fit, or is the training data."""
    if cfg.validation is None:
        return None
    held_out, _ = load_training_data(cfg.validation, model, model_folder, held_out=True)
    require(
        held_out.fingerprint != data.fingerprint,
        "validation= has the rows of data=; give held-out ones (of a corpus: split='validation')",
    )
    return Validation(trainee.score, held_out, mesh, cfg)


def require_own(workdir: Path, cfg: TrainConfig) -> None:
    """Raises: InputError if this run would overwrite files that it did not make."""
    tokenizer = getattr(cfg.data, "tokenizer", None)
    made = ("router",) if cfg.backbone else ("model", "model.unfinished", "tokenizer.json")
    require_unclaimed(workdir, EXPERIMENT, (*OUTPUTS, *made), reads=tokenizer)
    if cfg.backbone:
        storage.require_replaceable_router(workdir / "router")
    else:
        for folder in (workdir, *(step_folder(workdir, step) for step in cfg.keep_models_at)):
            folders.require_replaceable_model(folder / "model")


def step_folder(workdir: str | Path, step: int) -> Path:
    """Where the model after so many steps is exported: see `TrainConfig.keep_models_at`."""
    return Path(workdir) / "steps" / f"{step:08d}"


def require_kept(workdir: Path, cfg: TrainConfig, step: int, total: int) -> None:
    """Raises: InputError for a model to keep that the run from `step` to `total` does not make."""
    for kept in cfg.keep_models_at:
        require(
            kept <= total,
            f"keep_models_at: step {kept} is after the last one, {total}; leave it out",
        )
        folder = step_folder(workdir, kept)
        require(
            kept > step or kept == step == 0 or (folder / "model").exists(),
            f"keep_models_at: {workdir} has taken {step} steps and kept no model of step {kept}; "
            "leave it out, or choose another --workdir",
        )


def require_same_experiment(
    workdir: Path, cfg: TrainConfig, identity: dict[str, Any], steps_per_epoch: int, step: int
) -> None:
    """Checks that the run in the workdir, if there is one, can continue with these settings.

    Args:
      step: of the checkpoint that the run continues from. More steps, or another warm-up, are the
        same experiment if no learning rate changes after it.
    Raises: InputError naming the first setting that does not fit.
    """
    theirs, other = read_mark(workdir / EXPERIMENT), f"{workdir} holds another experiment"
    if theirs is None:
        return
    try:  # a setting that is newer than the run had its default
        before = from_dict(TrainConfig, theirs.get("train", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise InputError(f"{other} ({line}); choose another --workdir") from error
    theirs["train"] = to_dict(before)
    rates = []
    free = FREE_FIELDS if cfg.backbone else FREE_FIELDS + ROUTER_FIELDS
    for name, (old, new) in differences(theirs, {"train": to_dict(cfg), **identity}).items():
        said = f"{name.removeprefix('train.')} is {old!r} there and {new!r} here"
        if name in RATE_FIELDS:
            rates.append(said)
        else:
            require(name.startswith(free), f"{other} ({said}); choose another --workdir")
    if rates:
        _require_same_rates(workdir, before.optimizer, cfg, steps_per_epoch, step, rates[0])


def _require_same_rates(
    workdir: Path,
    old: OptimizerConfig,
    cfg: TrainConfig,
    steps_per_epoch: int,
    step: int,
    said: str,
) -> None:
    """Raises: InputError if a learning rate from `step` on would change."""
    total = num_steps(cfg.optimizer, steps_per_epoch)
    require(total >= step, f"{workdir} has taken {step} steps and {total} are asked for; ask more")
    # One step more than both have: a cosine would jump where the old run ends.
    steps = jnp.arange(step, min(total, num_steps(old, steps_per_epoch)) + 1)
    before, now = (
        jax.vmap(make_lr_schedule(optimizer, steps_per_epoch))(steps)
        for optimizer in (old, cfg.optimizer)
    )
    model = workdir / "model"
    advice = f"train on with --init-from {model} in" if cfg.model and model.is_dir() else "choose"
    require(
        bool(jnp.all(before == now)),
        f"{workdir} holds another experiment ({said}, which changes the learning rates of its "
        f"steps); keep it, or {advice} another --workdir",
    )


def shared_settings(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that all processes have in common: each may find data and models elsewhere."""
    settings = to_dict(cfg)
    for data in (settings["data"], settings["validation"] or {}):
        for place in PLACES:
            data.pop(place, None)
    return {name: x for name, x in settings.items() if name not in ("backbone", "init_from")}


def claim_workdir(workdir: Path, cfg: TrainConfig, identity: dict[str, Any]) -> None:
    """Records what the workdir is for."""
    values = {"train": to_dict(cfg), **identity}
    on_first_process(lambda: write_json(workdir / EXPERIMENT, values, digest=True))
