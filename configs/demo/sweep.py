"""The demo's sweep: full, static, random and routed execution on held-out items.

python eval.py --config configs/demo/sweep.py --workdir runs/demo/sweep
"""

from dials_jax.config import ArithmeticData, EvalConfig, EvalTask


def get_config() -> EvalConfig:
    return EvalConfig(
        model="runs/demo/model",
        routers=("runs/demo/router-low", "runs/demo/router-mid", "runs/demo/router-high"),
        tasks=(EvalTask(name="arithmetic", metric="exact_match", data=ArithmeticData()),),
        num_static=(1, 2, 3),
        num_random=(1, 2, 3),
        batch_size=100,
    )
