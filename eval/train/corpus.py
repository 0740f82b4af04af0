"""Plain text in, tokenised sentences out.

A corpus is a set of `.txt` and `.md` files. Blank lines part paragraphs; a paragraph is what one context chunk is cut
from. A tenth of the paragraphs, chosen by a hash of their text, is held out for evaluation.
"""

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_TEXT = (REPOSITORY / "examples", REPOSITORY / "eval" / "passages")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


class NoText(Exception):
    """No usable text was found; the message says where it was looked for."""


@dataclass
class Human:
    """A question about a passage that a user brought along."""

    passage: list[str]
    question: str
    answer: str


def text_files(folders: list[Path]) -> list[Path]:
    """All `.txt` and `.md` files below the folders (or the files themselves), sorted."""
    found = []
    for folder in folders:
        if folder.is_file():
            found.append(folder)
        elif folder.is_dir():
            found += [p for p in folder.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()]
    return sorted(set(found))


def paragraphs(text: str) -> list[str]:
    """Paragraphs of at least six words; Markdown marks, code blocks and tables are left out."""
    text = re.sub(r"^(```|~~~).*?^\1.*?$", "", text, flags=re.S | re.M)
    result = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith("|")]
        lines = [re.sub(r"^\s*(#+|>|[-*+]|\d+\.)\s+", "", line) for line in lines]
        flat = re.sub(r"[*`]|\[(?=[^\]]*\]\()|\]\([^)]*\)", "", " ".join(lines))
        flat = re.sub(r"\s+", " ", flat).strip()
        if len(flat.split()) >= 6:
            result.append(flat)
    return result


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut at sentence ends."""
    return [s.strip() for s in SENTENCE_END.split(paragraph) if s.strip()]


def read_paragraphs(folders: list[Path]) -> list[str]:
    """Every paragraph of the corpus, each once.

    Raises `NoText` when the folders hold none.
    """
    files = text_files(folders)
    seen = dict.fromkeys(p for f in files for p in paragraphs(f.read_text(encoding="utf-8")))
    if not seen:
        where = ", ".join(str(f) for f in folders)
        raise NoText(f"expected .txt or .md files with paragraphs of text below {where}; found none: pass --text FOLDER")
    return list(seen)


def read_questions(path: Path) -> list[Human]:
    """Lines `{"passage": ..., "question": ..., "answer": ...}` of a JSON-lines file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Human(sentences(r["passage"]), r["question"], r["answer"]) for r in records]


def split(items: list[str], evaluation: bool) -> list[str]:
    """The held-out tenth of the paragraphs, or the rest of them. A corpus too small to be split serves both."""
    part = [p for p in items if (zlib.crc32(p.encode()) % 10 == 0) == evaluation]
    return part if part else items


def common_words(items: list[str], limit: int = 4000) -> list[str]:
    """The corpus's most common lower-case words of 4 to 9 letters: keys are made of them."""
    counts = Counter(w for p in items for w in re.findall(r"\b[a-z]{4,9}\b", p))
    return sorted(w for w, _ in counts.most_common(limit))


class Sentences:
    """Tokenised sentences, flat, so that forked workers share the memory.

    Each is stored twice: as it stands at a chunk's start, and with the space before it that it has anywhere else.
    """

    def __init__(self, tokenizer, items: list[str]):
        parts = [sentences(p) for p in items]
        self.text = [s for part in parts for s in part]
        sizes = np.array([len(part) for part in parts])
        self.paragraph_end = np.repeat(np.cumsum(sizes), sizes)
        self.start, self.start_at = _flatten(tokenizer.encode_batch_fast(self.text, add_special_tokens=False))
        self.inner, self.inner_at = _flatten(tokenizer.encode_batch_fast([" " + s for s in self.text], add_special_tokens=False))

    def __len__(self) -> int:
        return len(self.text)

    def tokens(self, index: int, first: bool) -> np.ndarray:
        """The ids of one sentence."""
        flat, at = (self.start, self.start_at) if first else (self.inner, self.inner_at)
        return flat[at[index] : at[index + 1]]

    def length(self, index: int) -> int:
        """Its number of tokens inside a chunk."""
        return int(self.inner_at[index + 1] - self.inner_at[index])


def _flatten(encodings) -> tuple[np.ndarray, np.ndarray]:
    ids = [e.ids for e in encodings]
    at = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(i) for i in ids], out=at[1:])
    flat = np.fromiter((t for i in ids for t in i), np.uint16, count=int(at[-1]))
    return flat, at
