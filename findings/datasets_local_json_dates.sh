#!/bin/bash
# datasets 5.2.0: texts of a local JSON Lines file that look like dates come back spelt another way,
# although JSON has no dates and every value of the column is a text.
# Expected: "2024-01-05", as the file says.
# Seen: a datetime, so its text is "2024-01-05 00:00:00"; a column with one other text stays as it is.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q datasets==5.2.0
cat > "$W/run.py" <<'PY'
import json
import sys
from pathlib import Path

from datasets import load_dataset

folder = Path(sys.argv[1])


def read(name, texts):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    return [str(row["text"]) for row in rows]


found = read("dates", ["2024-01-05", "2024-02-06"]), read("mixed", ["2024-01-05", "hello"])
print(found)
sys.exit(found != (["2024-01-05 00:00:00", "2024-02-06 00:00:00"], ["2024-01-05", "hello"]))
PY
mkdir "$W/folder"
HF_HUB_OFFLINE=1 HF_HOME="$W/home" "$W/venv/bin/python" "$W/run.py" "$W/folder" 2>/dev/null
