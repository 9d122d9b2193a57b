"""Every setting, as frozen dataclasses: hashable, serialisable, checked when made.

A dataclass here is a static argument of `jax.jit`, the content of `config.json` and the schema of
the command line. A function takes the smallest of them that it needs.
"""

from importlib import import_module
from typing import Any

from dials_jax.config.data import ArithmeticData, CorpusData, Data, TaskData, TextData
from dials_jax.config.model import (
    DTYPES,
    EightBits,
    Layout,
    MeshConfig,
    ModelConfig,
    RouterConfig,
    Votes,
    WeightDtype,
)
from dials_jax.config.study import (
    ImportanceStudy,
    ProposeStudy,
    SamplingStudy,
    ScheduleStudy,
    SearchStudy,
    StudyConfig,
)
from dials_jax.config.training import ObjectiveConfig, OptimizerConfig, TrainConfig
from dials_jax.config.typed import (
    INT32,
    Count,
    Place,
    Range,
    Seed,
    Typed,
    as_list,
    as_type,
    from_dict,
    require_positive,
    shown,
    to_dict,
    typed,
)

__all__ = [
    "DTYPES",
    "INT32",
    "ArithmeticData",
    "CorpusData",
    "Count",
    "Data",
    "EightBits",
    "EvalConfig",
    "EvalTask",
    "HarnessConfig",
    "HarnessModel",
    "ImportanceStudy",
    "Layout",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Place",
    "ProposeStudy",
    "Range",
    "RepresentationStudy",
    "RouterConfig",
    "SamplingStudy",
    "ScheduleStudy",
    "SearchStudy",
    "Seed",
    "StudyConfig",
    "TaskData",
    "TextData",
    "TrainConfig",
    "Typed",
    "Votes",
    "WeightDtype",
    "as_list",
    "as_type",
    "from_dict",
    "require_positive",
    "shown",
    "to_dict",
    "typed",
]

# What a configuration file imports from here, but what stands above: it names samplers and caches,
# which have settings of this package.
_ABOVE = {
    "EvalConfig": "dials_jax.evaluation.task",
    "EvalTask": "dials_jax.evaluation.task",
    "HarnessConfig": "dials_jax.evaluation.harness",
    "HarnessModel": "dials_jax.evaluation.harness",
    "RepresentationStudy": "dials_jax.studies.settings",
}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(import_module(_ABOVE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
