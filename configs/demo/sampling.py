"""The demo's model under four rules of sampling: accuracy against tokens a pass (docs/sampling.md).

python eval.py --config configs/demo/sampling.py --workdir runs/demo/sampling
"""

from dials_jax.config import ArithmeticData, EvalConfig, EvalTask
from dials_jax.sampling.confidence import Confidence

LENGTH = 5  # tokens of an answer
RULES = {
    "steps": (1, 2, 3, 5),
    "threshold": (0.5, 0.7, 0.9, 0.99),
    "entropy_threshold": (1.0, 0.3, 0.1, 0.01),
    "entropy_bound": (1.0, 0.3, 0.1, 0.01),
}


def get_config() -> EvalConfig:
    samplers = {
        f"{rule} {value}": Confidence(LENGTH, **{rule: value})
        for rule, values in RULES.items()
        for value in values
    }
    samplers |= {
        f"threshold {value}, edited": Confidence(LENGTH, threshold=value, edit_threshold=0.9)
        for value in RULES["threshold"]
    }
    return EvalConfig(
        model="runs/demo/model",
        tasks=tuple(
            EvalTask(
                name=f"arithmetic {name}",
                metric="exact_match",
                data=ArithmeticData(),
                sampler=sampler,
            )
            for name, sampler in samplers.items()
        ),
        num_static=(),
        num_random=(),
        batch_size=100,
    )
