#!/usr/bin/env bash
# The whole chain on a CPU with a tiny model: train, interrupt and resume, export, evaluate, compare with transformers.
# It shows that the parts fit together; the model is far too small and too briefly trained to answer anything.
# Usage: eval/train/smoke.sh [PYTHON]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
train=("$python" "$here/train.py" --tiny --device cpu --workers 1 --log-every 20 --out "$out")

"$python" "$here/check_data.py"
"${train[@]}" --steps 40 --checkpoint-minutes 0.01
"${train[@]}" --steps 60 --checkpoint-minutes 0.01 --resume
"$python" "$here/evaluate.py" --model "$out" --device cpu --lengths 512 --count 2 --dump "$out/questions.jsonl"
"$python" "$here/evaluate.py" --model "$out" --device cpu --records "$out/questions.jsonl" --out "$out/again.json"
"$python" "$here/check_export.py" "$out"
"$python" - "$out" <<'PY'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
lines = [json.loads(line) for line in (out / "train-log.jsonl").read_text().splitlines()]
curve = [line for line in lines if "lengths" in line]
first, last = (line["lengths"]["512"] for line in (curve[0], curve[-1]))
assert curve[-1]["step"] == 60, curve[-1]
assert last["answer_loss"] < first["answer_loss"] - 1, (first, last)
made, read = (json.loads((out / n).read_text())["results"] for n in ("measured.json", "again.json"))
assert made == read, "questions read back from a file score otherwise"
print(f"smoke: answer loss {first['answer_loss']} -> {last['answer_loss']}, resumed at step 40, all in order")
PY
