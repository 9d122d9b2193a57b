#!/bin/bash
# lm_eval 0.4.13: --use_cache finds an answer by the request alone. After a change of the model or of
# its arguments the old answers are scored as if they were new.
# Expected: other model arguments (here: another reply) give other answers, or an error.
# Seen: the second run scores the answers of the first.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q lm_eval==0.4.13
cat > "$W/run.py" <<'PY'
import json
import sys
from pathlib import Path

import lm_eval.models
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

folder = Path(sys.argv[1])
(folder / "data.jsonl").write_text(json.dumps({"question": "1+1=", "answer": "2"}) + "\n")
task = {
    "task": "sum", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
    "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"]}, "metric_list": [{"metric": "exact_match"}],
}
(folder / "sum.yaml").write_text(json.dumps(task))


@register_model("constant")
class Constant(LM):
    def __init__(self, reply, batch_size=1, **kwargs):
        super().__init__()
        self.reply = str(reply)

    def generate_until(self, requests):
        return [self.reply for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def score(reply):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        "constant", model_args={"reply": reply}, tasks=["sum"], task_manager=manager,
        use_cache=str(folder / "cache"), bootstrap_iters=0,
    )
    return results["results"]["sum"]["exact_match,none"]


found = score(2), score(3)
print(found)
sys.exit(found != (1.0, 1.0))
PY
mkdir "$W/folder"
HF_HUB_OFFLINE=1 HF_HOME="$W/home" "$W/venv/bin/python" "$W/run.py" "$W/folder" 2>/dev/null
