#!/bin/bash
# transformers 5.23.0, tokenizers 0.23.3: a tokenizer folder without tokenizer.json states the id of
# every added token in tokenizer_config.json (added_tokens_decoder). Where the ids leave a hole, the
# token gets the next id that is free instead, without a warning.
# Expected: <|mask|> is 300, as the file says (a model's embedding has its row there), or an error.
# Seen: 257.
set -e
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
python3 -m venv "$W/venv"
"$W/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cat > "$W/run.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
(folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
added = {256: "<|endoftext|>", 300: "<|mask|>"}
(folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>",
    "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in added.items()},
}))
found = AutoTokenizer.from_pretrained(folder, local_files_only=True).mask_token_id
print("stated 300, given", found)
sys.exit(found != 257)
PY
mkdir "$W/folder"
"$W/venv/bin/python" "$W/run.py" "$W/folder"
