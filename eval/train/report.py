#!/usr/bin/env python3
"""Writes the tables of README.md from measured.json, between the two marks. Usage: report.py [MEASURED [README]]"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- measured: begin (written by report.py) -->", "<!-- measured: end -->"


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def results(measured: dict) -> list[str]:
    """Exact match by task and length."""
    cells = {(r["task"], r["length"]): r for r in measured["results"]}
    lengths = sorted({length for _, length in cells})
    rows = []
    for task in dict.fromkeys(r["task"] for r in measured["results"]):
        row = [task]
        for length in lengths:
            r = cells.get((task, length))
            low, high = r["interval_95"] if r else (0, 0)
            part = f", part {r['part']}" if r and r["part"] != r["exact"] else ""
            row.append(f"{r['exact']} ({low} to {high}{part}; n {r['n']})" if r else "")
        rows.append(row)
    return grid(["task"] + [str(n) for n in lengths], rows)


def curve(measured: dict) -> list[str]:
    """Answer loss and right answer tokens along the training."""
    lines = [line for line in measured["training"] if "lengths" in line]
    if not lines:
        return []
    lengths = sorted({int(n) for line in lines for n in line["lengths"]})
    rows = []
    for line in lines:
        row = [str(line["step"]), f"{line['seconds']:.0f}", f"{line['tokens'] / 1e6:.0f} M", str(line["ms_a_step"])]
        for n in lengths:
            cell = line["lengths"].get(str(n))
            row.append(f"{cell['answer_loss']:.3f} / {cell['right_percent']:.1f}" if cell else "")
        rows.append(row)
    return grid(["step", "s", "tokens", "ms a step"] + [str(n) for n in lengths], rows)


def main() -> int:
    """Replaces the text between the marks."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "measured.json"
    readme = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "README.md"
    measured = json.loads(source.read_text(encoding="utf-8"))
    starts = [line["start"] for line in measured["training"] if "start" in line]
    text = [BEGIN, ""]
    if starts:
        text += [f"Trained on {starts[-1]['paragraphs']} paragraphs of text by", "", f"    {starts[-1]['command']}", ""]
    text += [f"Measured on {measured['machine']}, {measured['date']}, PyTorch {measured['torch']}, by", "",
             f"    {measured['command']}", "", "Greedy exact match in % (95 % interval):", ""]
    text += results(measured)
    text += ["", "Answer loss / right answer tokens in % (teacher forcing, training batches) by row length:", ""]
    text += curve(measured) + ["", END]
    page = readme.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(before + "\n".join(text) + after, encoding="utf-8")
    print(f"wrote the tables of {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
