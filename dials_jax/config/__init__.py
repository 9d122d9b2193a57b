"""Every setting, as frozen dataclasses: hashable, serialisable, checked when made.

A dataclass here is a static argument of `jax.jit`, the content of `config.json` and the schema of
the command line. A function takes the smallest of them that it needs.
"""

from dials_jax.config.base import (
    InputError,
    finite,
    from_dict,
    nearest,
    read_json,
    require,
    require_packages,
    require_positive,
    require_writable,
    to_dict,
    write_json,
)
from dials_jax.config.data import ArithmeticData, CorpusData, Data, TaskData, TextData
from dials_jax.config.evaluation import EvalConfig, EvalTask
from dials_jax.config.model import DTYPES, MeshConfig, ModelConfig, RouterConfig
from dials_jax.config.paths import local_path
from dials_jax.config.study import (
    ImportanceStudy,
    ProposeStudy,
    SamplingStudy,
    ScheduleStudy,
    SearchStudy,
    StudyConfig,
)
from dials_jax.config.training import ObjectiveConfig, OptimizerConfig, TrainConfig

__all__ = [
    "DTYPES",
    "ArithmeticData",
    "CorpusData",
    "Data",
    "EvalConfig",
    "EvalTask",
    "ImportanceStudy",
    "InputError",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ProposeStudy",
    "RouterConfig",
    "SamplingStudy",
    "ScheduleStudy",
    "SearchStudy",
    "StudyConfig",
    "TaskData",
    "TextData",
    "TrainConfig",
    "finite",
    "from_dict",
    "local_path",
    "nearest",
    "read_json",
    "require",
    "require_packages",
    "require_positive",
    "require_writable",
    "to_dict",
    "write_json",
]
