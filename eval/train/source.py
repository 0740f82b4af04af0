"""From the user's folders to a composer of samples."""

import random
from pathlib import Path

from corpus import DEFAULT_TEXT, Sentences, common_words, read_paragraphs, read_questions, split
from rows import Composer
from tasks import WORDINGS, Tasks
from tokenizer import VOCABULARY, load_tokenizer, name_samples, train_tokenizer
from words import Names, filler_sentence

SYNTHETIC_PARAGRAPHS = 1500


class Source:
    """The text, the wordings and the tokenizer of a run."""

    def __init__(self, text: list[Path], wordings: Path | None = None, questions: Path | None = None):
        self.folders = list(text) or list(DEFAULT_TEXT)
        self.paragraphs = read_paragraphs(self.folders)
        self.wordings = wordings or WORDINGS
        self.human = read_questions(questions) if questions else []
        self.words = common_words(self.paragraphs)
        self.tokenizer = None

    def names(self, evaluation: bool) -> Names:
        """Words and names of one split."""
        return Names(evaluation, self.words)

    def load_tokenizer(self, path: Path | None) -> None:
        """Reads a `tokenizer.json`, or trains one on the training text, filler and samples of names and facts."""
        if path:
            self.tokenizer = load_tokenizer(path)
            if self.tokenizer.get_vocab_size() > VOCABULARY:
                raise ValueError(f"{path}: expected at most {VOCABULARY} tokens, found {self.tokenizer.get_vocab_size()}")
            return
        rng = random.Random(1)
        tasks = Tasks(self.names(False), self.wordings)
        facts = []
        for _ in range(40):
            for task in ("niah_multikey", "niah_uuid", "vt", "x_alias", "x_ref", "x_report", "x_pron", "x_same"):
                plan = tasks.make(rng, task, 4)
                facts += [p for g in plan.groups for p in g.pieces] + [q.text for q in plan.questions]
        filler = [filler_sentence(rng) for _ in range(2000)]
        names = name_samples(self.names(False), 6000)
        self.tokenizer = train_tokenizer(split(self.paragraphs, False) + facts + filler + names)

    def composer(self, evaluation: bool) -> Composer:
        """A composer over the training text, or over the held-out text, words and names."""
        rng = random.Random(2 + evaluation)
        made = [" ".join(filler_sentence(rng) for _ in range(rng.randint(3, 9))) for _ in range(SYNTHETIC_PARAGRAPHS)]
        filler = Sentences(self.tokenizer, split(self.paragraphs, evaluation))
        tasks = Tasks(self.names(evaluation), self.wordings)
        return Composer(self.tokenizer, filler, Sentences(self.tokenizer, made), tasks, self.human)
