"""Contexts with questions: plans of facts placed into passages, up to an exact number of tokens."""

import random
from dataclasses import dataclass

import numpy as np

from corpus import Human, Sentences
from tasks import CROSSING, NEEDLES, Plan, Question, Tasks
from tokenizer import ANSWER, BOS, CHUNK, EOS, PAD, QUESTION

NOTHING, TEXT, REPLY = 0, 1, 2  # what a token is to the loss
SYNTHETIC = 0.25  # share of the passages that are made-up filler
CLOZE_TOKENS = 45  # room kept for one cloze question


@dataclass
class Sample:
    """One context and its questions, as token ids."""

    chunks: list[list[int]]
    questions: list[Question]
    asked: list[tuple[list[int], list[int]]]

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and kinds of one training row, padded to `length`."""
        ids, kinds = [BOS], [NOTHING]
        for chunk in self.chunks:
            ids += chunk + [CHUNK]
            kinds += [TEXT] * len(chunk) + [NOTHING]
        for question, answer in self.asked:
            ids += [QUESTION, *question, ANSWER, *answer, EOS]
            kinds += [NOTHING] * (len(question) + 2) + [REPLY] * (len(answer) + 1)
        pad = length - len(ids)
        if pad < 0:
            raise AssertionError(f"a row of {len(ids)} tokens was built for {length}")
        return np.array(ids + [PAD] * pad, np.int32), np.array(kinds + [NOTHING] * pad, np.uint8)


class Item:
    """A sentence in a chunk: planted (`text` and ids) or filler (`index` into the corpus)."""

    __slots__ = ("key", "text", "ids", "index")

    def __init__(self, key: tuple[float, float], text: str = "", ids: list[int] | None = None, index: int = -1):
        self.key, self.text, self.ids, self.index = key, text, ids, index


class Composer:
    """Builds samples of one split."""

    def __init__(self, tokenizer, filler: Sentences, synthetic: Sentences, tasks: Tasks, human: list[Human] | None = None):
        self.tokenizer, self.tasks, self.human = tokenizer, tasks, human or []
        self.pools = (filler, synthetic)
        ids = [tokenizer.token_to_id(d) for d in "0123456789"]
        self.digits = np.array(ids, np.int32)
        self.line_tokens = self.longest_line()

    def longest_line(self) -> float:
        """Mean tokens of a key-value line in the longest of the wordings."""
        rng = random.Random(0)
        sizes = []
        for wording in self.tasks.say["kv"]:
            lines = [wording["line"].format(key=self.tasks.value(rng, "words"), value="12345") for _ in range(50)]
            sizes.append(sum(len(i) + 1 for i in self.encode(lines)) / 50)
        return max(sizes)

    def lines(self, length: int, share: float) -> int:
        """How many key-value lines fill about this share of a context."""
        return max(4, int(share * length / self.line_tokens))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def training_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of exactly `length` tokens after the training mixture; in half of the rows the digits are permuted."""
        most = min(48, max(5, length // 120))
        questions = rng.randint(max(3, most // 2), most)
        sample = self.compose(rng, length, self.mixture(rng, length), questions, cloze=self.clozes(rng, questions))
        ids, kinds = sample.row(length)
        if rng.random() < 0.5:
            mapping = np.arange(self.tokenizer.get_vocab_size() + 8, dtype=np.int32)
            shuffled = self.digits.copy()
            np.random.default_rng(rng.getrandbits(64)).shuffle(shuffled)
            mapping[self.digits] = shuffled
            ids = mapping[ids]
        return ids, kinds

    def clozes(self, rng: random.Random, questions: int) -> int:
        """How many of the questions hide a word of the passages."""
        return rng.randint(1, max(1, questions // 3)) if rng.random() < 0.3 else 0

    def mixture(self, rng: random.Random, length: int) -> Plan:
        """Facts for one training row: key-value lines in a tenth of them, else one to four other tasks."""
        if rng.random() < 0.1:
            return self.tasks.make(rng, "kv", self.lines(length, rng.uniform(0.3, 0.8)))
        plan = Plan()
        if self.human and rng.random() < 0.4:
            for h in rng.sample(self.human, min(len(self.human), max(1, length // 700))):
                plan.blocks.append(" ".join(h.passage))
                plan.ask("human", h.question, h.answer)
        count = rng.randint(1, 1 if length <= 512 else 2 if length <= 1024 else 3) + (length >= 8192)
        kinds = ("needles", "vt") + CROSSING
        weights = (3.0, 2.6, 1.1, 1.0, 0.7, 1.3, 1.3)
        for kind in set(rng.choices(kinds, weights, k=count)):
            groups = max(1, length // (count * rng.choice((128, 200, 300, 512))))
            name = rng.choice(NEEDLES) if kind == "needles" else kind
            plan.merge(self.tasks.make(rng, name, min(groups, 32)))
        return plan

    def evaluation_sample(self, rng: random.Random, task: str, length: int) -> Sample:
        """A context of `length` tokens (answer included) with one question of the task."""
        if task == "cloze":
            sample = self.compose(rng, length, Plan(), 1, cloze=1)
            if not sample.questions:
                raise Crowded("no sentence with a word to hide")
            return sample
        if task == "kv":
            size = self.lines(length, 0.8)
        else:
            size = min(24, max(1, length // 512)) if task in CROSSING else max(1, length // 256)
        return self.compose(rng, length, self.tasks.make(rng, task, size), 1)

    def compose(self, rng: random.Random, length: int, plan: Plan, questions: int, cloze: int = 0) -> Sample:
        """A sample of at most `length` tokens with at most `questions` questions, `cloze` of them gaps."""
        planned = min(len(plan.questions), questions - cloze)
        chosen = rng.sample(plan.questions, planned)
        asked = self.asked(chosen)
        spent = sum(len(q) + len(a) + 3 for q, a in asked)
        while spent > 0.4 * length and len(asked) > 1:
            chosen.pop()
            q, a = asked.pop()
            spent -= len(q) + len(a) + 3
        reserve = cloze * CLOZE_TOKENS if cloze * CLOZE_TOKENS < 0.3 * length else 0
        room = length - 1 - spent - reserve
        groups, blocks = self.fit(rng, plan, chosen, room)
        chunks, used = self.place(rng, groups, blocks, room)
        if reserve:
            gaps = self.gaps(rng, used, cloze)
            for question, pair in zip(gaps, self.asked(gaps)):
                if len(pair[0]) + len(pair[1]) + 3 <= reserve:
                    reserve -= len(pair[0]) + len(pair[1]) + 3
                    chosen.append(question)
                    asked.append(pair)
        order = list(range(len(chosen)))
        rng.shuffle(order)
        return Sample(chunks, [chosen[i] for i in order], [asked[i] for i in order])

    def asked(self, questions: list[Question]) -> list[tuple[list[int], list[int]]]:
        """The ids of questions and answers."""
        ids = self.encode([t for q in questions for t in (q.text, q.answer)])
        return list(zip(ids[::2], ids[1::2]))

    def fit(self, rng: random.Random, plan: Plan, chosen: list[Question], room: int):
        """The groups and blocks that fit into `room`; those that a chosen question needs come first."""
        needed = {n for q in chosen for n in q.needs}
        order = sorted(needed) + [n for n in range(len(plan.groups)) if n not in needed]
        ids = self.encode([" " + p for n in order for p in plan.groups[n].pieces])
        groups, at, used = [], 0, 0
        for n in order:
            group = plan.groups[n]
            part = ids[at : at + len(group.pieces)]
            at += len(group.pieces)
            size = sum(map(len, part))
            if n in needed or used + size <= 0.6 * room:
                used += size
                groups.append((group, part))
        blocks = self.encode(plan.blocks)
        if used + sum(len(b) + 1 for b in blocks) > 0.95 * room:
            raise Crowded(f"facts of {used} tokens and {len(blocks)} blocks do not fit into {room}")
        return groups, blocks

    def place(self, rng: random.Random, groups, blocks: list[list[int]], room: int):
        """Chunks of passages with the groups planted in them, and the numbers of the filler sentences used."""
        planted = sum(len(ids) for _, part in groups for ids in part)
        budget = room - planted - sum(len(b) + 1 for b in blocks)
        boundaries = sum(g.place == "boundary" for g, _ in groups)
        widest = max((len(g.pieces) for g, _ in groups), default=1)
        filler = self.filler(rng, budget, max(boundaries + 2, widest + 1))
        free = list(range(len(filler) - 1))
        rng.shuffle(free)
        for group, part in groups:
            for piece, ids, key in zip(group.pieces, part, self.keys(rng, group, filler, free)):
                filler[int(key[0])].append(Item(key[1:], piece, ids))
        for items in filler:
            items.sort(key=lambda item: item.key)
        chunks = [self.join(items) for items in filler]
        for block in blocks:  # never between the two sides of a boundary fact
            chunks.insert(rng.choice((0, len(chunks))) if boundaries else rng.randint(0, len(chunks)), block)
        if sum(len(c) + 1 for c in chunks) > room:
            raise Crowded("first sentences took more tokens than were counted for them")
        return chunks, [item.index for items in filler for item in items if item.index >= 0]

    def filler(self, rng: random.Random, budget: int, least: int) -> list[list[Item]]:
        """At least `least` chunks of sentences, within `budget` tokens with their chunk marks."""
        largest = max(24, min(400, budget // (least + 1)))
        chunks: list[list[Item]] = []
        misses = 0
        while budget > 12 and misses < 4:
            items, size, target = [], 0, rng.randint(min(40, largest), largest)
            while size < target:
                index, sizes = self.passage(rng, min(budget - 4, target - size + 30))
                for i, n in zip(index, sizes):
                    items.append(Item((len(items) + 1.0, 0.0), index=i))
                    size += n
                    budget -= n
                if not index or rng.random() < 0.5:
                    break
            if items:
                budget -= 2  # the chunk's mark, and a token that its first sentence may take more than counted
                chunks.append(items)
            else:
                misses += 1
        if len(chunks) < least:
            raise Crowded(f"{len(chunks)} chunks where {least} are needed")
        return chunks

    def passage(self, rng: random.Random, limit: int) -> tuple[list[int], list[int]]:
        """Consecutive sentences of one paragraph (now and then of several), in at most `limit` tokens.

        Numbers below -1 stand for synthetic sentences: `-2 - i`.
        """
        synthetic = rng.random() < SYNTHETIC
        pool = self.pools[synthetic]
        at = rng.randrange(len(pool))
        end = int(pool.paragraph_end[at])
        scattered = rng.random() < 0.1
        index, sizes = [], []
        while limit > 0 and at < end:
            n = pool.length(at)
            if n > limit:
                break
            index.append(-2 - at if synthetic else at)
            sizes.append(n)
            limit -= n
            at = rng.randrange(len(pool)) if scattered else at + 1
        return index, sizes

    def keys(self, rng: random.Random, group, filler: list[list[Item]], free: list[int]) -> list[tuple[float, float, float]]:
        """Sorted positions (chunk, sentence, tie) for a group's pieces."""
        count = len(group.pieces)
        if group.place == "boundary":
            if not free:
                raise Crowded("more boundary facts than chunk boundaries")
            at = free.pop()
            return [(at, 1e9, 0.0)] + [(at + 1, -1e9, float(i)) for i in range(1, count)]
        if group.place == "spread":
            places = sorted(rng.sample(range(len(filler)), count))
        else:
            places = [rng.randrange(len(filler)) for _ in range(count)]
        return sorted((c, rng.randint(0, len(filler[c])) + 0.5, rng.random()) for c in places)

    def join(self, items: list[Item]) -> list[int]:
        """The ids of a chunk: its sentences with one space between them."""
        ids: list[int] = []
        for number, item in enumerate(items):
            if item.index != -1:
                pool = self.pools[item.index < -1]
                at = item.index if item.index >= 0 else -2 - item.index
                ids += pool.tokens(at, first=number == 0).tolist()
            elif number == 0:
                ids += self.tokenizer.encode(item.text, add_special_tokens=False).ids
            else:
                ids += item.ids
        return ids

    def gaps(self, rng: random.Random, used: list[int], count: int) -> list[Question]:
        """Cloze questions over sentences that the context holds."""
        found = []
        for index in rng.sample(used, min(len(used), 3 * count)):
            made = self.tasks.cloze(rng, self.pools[0].text[index])
            if made and len(found) < count:
                found.append(Question("cloze", made[0], made[1]))
        return found


class Crowded(Exception):
    """A plan did not fit; draw another."""


def retry(build, attempts: int = 50):
    """The first result of `build()` that fits; `build` must draw anew each time."""
    for _ in range(attempts):
        try:
            return build()
        except Crowded as crowded:
            last = crowded
    raise last
