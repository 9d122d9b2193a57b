"""The results of a sweep as eval.py writes them, with made-up numbers."""

import numpy as np

NUM_LAYERS, NUM_BINS, NUM_ITEMS = 12, 10, 120
METRICS = {"sums": "exact_match", "piqa": "choice", "text": "nelbo"}
POLICIES = [
    {"kind": "full", "label": "full"},
    *({"kind": "static", "label": f"static k={k}", "num_skipped": k} for k in (1, 2, 3, 4)),
    *({"kind": "random", "label": f"random k={k}", "num_skipped": k} for k in (1, 2, 3, 4)),
    *({"kind": "routed", "label": f"routed λ={x:g}", "lambda": x} for x in (0.3, 1.0, 3.0)),
]


def executed_shares(policy):
    """[bins, L] chance that a layer is executed at a mask ratio."""
    shares = np.ones((NUM_BINS, NUM_LAYERS))
    k = policy.get("num_skipped")
    if policy["kind"] == "static":
        shares[:, [5, 7, 9, 3][:k]] = 0
    if policy["kind"] == "random":
        shares[:] = 1 - k / NUM_LAYERS
    if policy["kind"] == "routed":
        ratio = (np.arange(NUM_BINS)[:, None] + 0.5) / NUM_BINS
        late = np.linspace(-0.6, 0.6, NUM_LAYERS) + 0.25 * np.sin(np.arange(NUM_LAYERS) * 2.1)
        shares = np.clip(1 - 0.45 * policy["lambda"] ** 0.5 * late.clip(0) * (1.4 - ratio), 0, 1)
    return shares


def make_run(task, policy, num_items=NUM_ITEMS):
    seed = [ord(c) for c in task + policy["label"]]
    items_rng, run_rng = np.random.default_rng(len(task)), np.random.default_rng(seed)
    price = {"full": 0, "static": 0.5, "random": 1.1, "routed": 0.15}[policy["kind"]]
    ability, noise = items_rng.normal(0.8, 1, num_items), run_rng.normal(0, 0.3, num_items)
    shares = executed_shares(policy)
    scores = ability + noise * (price > 0) - 3 * price * (1 - shares.mean())
    scores = 3 - scores / 4 if METRICS[task] == "nelbo" else (scores > 0).astype(int)
    rows = np.full(NUM_BINS, 64 * num_items // NUM_BINS)
    if task == "piqa":
        rows[:2] = 0  # short answers never reach a small mask ratio
    return {
        "task": task,
        "metric": METRICS[task],
        "policy": dict(policy),
        "items": {f"{task}-{i}": score for i, score in enumerate(scores.tolist())},
        "flops": {
            "layers_run": float(shares.mean()),
            "model": float(0.93 * shares.mean() + 0.07),
            "model_total": 1.2e12 * float(0.93 * shares.mean() + 0.07),
            "seconds": float(40 * shares.mean() + 5),
        },
        "execution": {"executed": (shares * rows[:, None]).tolist(), "rows": rows.tolist()},
        **({"examples": list(EXAMPLES)} if METRICS[task] == "exact_match" else {}),
    }


EXAMPLES = [
    {"prompt": "12+34=", "output": "46", "reference": "46", "correct": True},
    {"prompt": "<b>max</b> 3 & 9:", "output": "3", "reference": "9", "correct": False},
]


def make_results(tasks=tuple(METRICS), kinds=("full", "static", "random", "routed")):
    """By default the whole sweep."""
    return {
        "model": {
            "path": "checkpoints/llada_arithmetic",
            "num_layers": NUM_LAYERS,
            "parameters": 25_165_824,
            "fingerprint": "9f2c41d07a",
        },
        "environment": {
            "device": "cpu",
            "dtype": "float32",
            "jax": "0.10.2",
            "flax": "0.12.8",
            "python": "3.12.4",
            "date": "2025-01-01",
            "command": "python eval.py --config configs/eval_arithmetic.py --workdir runs/eval",
            "seed": 0,
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        },
        "runs": [make_run(t, p) for t in tasks for p in POLICIES if p["kind"] in kinds],
    }
