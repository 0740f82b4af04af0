"""The retrieval tasks: facts to plant into a context, and the questions they answer.

Each generator returns a `Plan`. What a fact says is taken from `wordings.json` (several wordings a task); where its
pieces may stand is the group's `place`:

* `any`: anywhere, in the given order;
* `spread`: each piece in a chunk of its own, in the given order;
* `boundary`: the first piece ends a chunk, the others begin the next one.

Everything is drawn from the `random.Random` that is passed in, so a seed fixes a task completely.
"""

import json
import random
import string
from dataclasses import dataclass, field
from pathlib import Path

from words import Names, held_out

WORDINGS = Path(__file__).resolve().parent / "wordings.json"


@dataclass
class Group:
    """Sentences that belong together."""

    pieces: list[str]
    place: str = "any"


@dataclass
class Question:
    """A question; `needs` are the groups (by position in the plan) without which it has no answer."""

    task: str
    text: str
    answer: str
    needs: tuple[int, ...] = ()


@dataclass
class Plan:
    """What one context is to hold. `blocks` are whole chunks of their own."""

    groups: list[Group] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def add(self, pieces: list[str], place: str = "any") -> int:
        """Adds a group and returns its number."""
        self.groups.append(Group(pieces, place))
        return len(self.groups) - 1

    def ask(self, task: str, text: str, answer: str, *needs: int) -> None:
        """Adds a question."""
        self.questions.append(Question(task, text, answer, needs))

    def merge(self, other: "Plan") -> None:
        """Takes another plan's groups, questions and blocks in."""
        shift = len(self.groups)
        self.groups += other.groups
        self.blocks += other.blocks
        self.questions += [Question(q.task, q.text, q.answer, tuple(n + shift for n in q.needs)) for q in other.questions]


class Tasks:
    """The generators of one split (training or evaluation)."""

    def __init__(self, names: Names, wordings: Path = WORDINGS):
        self.names = names
        self.say = json.loads(Path(wordings).read_text(encoding="utf-8"))

    def make(self, rng: random.Random, task: str, size: int) -> Plan:
        """A plan with about `size` groups of facts for the task of this name."""
        return getattr(self, "_" + task)(rng, size)

    def value(self, rng: random.Random, kind: str) -> str:
        """A random value: number, year, city, name, word, words, uuid or person."""
        if kind == "number":
            digits = rng.randint(3, 7)
            return str(rng.randrange(10 ** (digits - 1), 10**digits))
        if kind == "year":
            return str(rng.randint(700, 2020))
        if kind in ("city", "name"):
            return self.names.invented(rng)
        if kind == "person":
            return self.names.person(rng)[0]
        if kind == "word":
            return rng.choice(self.names.words)
        if kind == "words":
            return self.names.pair(rng)
        digits = "".join(rng.choice("0123456789abcdef") for _ in range(32))
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def distinct(self, rng: random.Random, kind: str, count: int) -> list[str]:
        """`count` different values."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.value(rng, kind)] = None
        return list(found)

    # Needles

    def _needles(self, rng: random.Random, size: int, kind: str, values: int = 1):
        """Needles of one wording: the plan, wording, noun, and the keys with their values."""
        wording, noun = rng.choice(self.say["needle"]), rng.choice(self.say["needle_nouns"][kind])
        plan, pairs = Plan(), []
        for key in self.distinct(rng, "words", size):
            many = self.distinct(rng, kind, rng.randint(2, 4) if values > 1 else 1)
            plan.add([wording["plant"].format(noun=noun, key=key, value=v) for v in many])
            pairs.append((key, many))
        return plan, wording, noun, pairs

    def _singles(self, rng: random.Random, size: int, kind: str, task: str) -> Plan:
        plan, wording, noun, pairs = self._needles(rng, size, kind)
        for number, (key, values) in enumerate(pairs):
            plan.ask(task, wording["one"].format(noun=noun, key=key), values[0], number)
        return plan

    def _niah_single(self, rng: random.Random, size: int) -> Plan:
        return self._singles(rng, 1, "number", "niah_single")

    def _niah_multikey(self, rng: random.Random, size: int) -> Plan:
        return self._singles(rng, size + 1, rng.choice(("number", "words")), "niah_multikey")

    def _niah_uuid(self, rng: random.Random, size: int) -> Plan:
        return self._singles(rng, max(2, size // 2), "uuid", "niah_uuid")

    def _niah_multivalue(self, rng: random.Random, size: int) -> Plan:
        plan, wording, noun, pairs = self._needles(rng, max(2, size // 3), rng.choice(("number", "number", "words")), 4)
        for number, (key, values) in enumerate(pairs):
            plan.ask("niah_multivalue", wording["all"].format(noun=noun, key=key), ", ".join(values), number)
        return plan

    def _niah_multiquery(self, rng: random.Random, size: int) -> Plan:
        plan, wording, noun, pairs = self._needles(rng, max(4, size), "number")
        for _ in range(max(1, len(pairs) // 2)):
            chosen = rng.sample(range(len(pairs)), rng.randint(2, 4))
            keys = [pairs[i][0] for i in chosen]
            listed = ", ".join(keys[:-1]) + " and " + keys[-1]
            answer = ", ".join(pairs[i][1][0] for i in chosen)
            plan.ask("niah_multiquery", wording["many"].format(noun=noun, key=listed), answer, *chosen)
        return plan

    # Key-value lines and variables

    def _kv(self, rng: random.Random, size: int) -> Plan:
        """`size` is the number of lines."""
        wording, plan = rng.choice(self.say["kv"]), Plan()
        keys = self.distinct(rng, "words", size)
        values = [str(rng.randrange(10000, 100000)) for _ in keys]
        lines = [wording["line"].format(key=k, value=v) for k, v in zip(keys, values)]
        at = 0
        while at < size:
            step = rng.randint(8, 30)
            plan.blocks.append("\n".join(lines[at : at + step]))
            at += step
        for number in rng.sample(range(size), min(size, 48)):
            plan.ask("kv", wording["question"].format(key=keys[number]), values[number])
        return plan

    def _variable(self, rng: random.Random, taken: set[str]) -> str:
        while True:
            name = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 5)))
            if name not in taken and held_out(name) == self.names.evaluation:
                taken.add(name)
                return name

    def _vt(self, rng: random.Random, size: int) -> Plan:
        wording, plan, taken = rng.choice(self.say["vt"]), Plan(), set()
        for value in self.distinct(rng, "number", min(10, max(2, size))):
            names = [self._variable(rng, taken) for _ in range(rng.randint(2, 5))]
            pieces = [wording["set"].format(a=names[0], value=value)]
            pieces += [wording["copy"].format(a=a, b=b) for a, b in zip(names[1:], names)]
            plan.ask("vt", wording["question"].format(value=value), ", ".join(names), plan.add(pieces))
        return plan

    # Facts over two or more chunks

    def _fact(self, rng: random.Random) -> tuple[dict, str]:
        fact = rng.choice(self.say["facts"])
        return fact, self.value(rng, fact["value"])

    def _x_alias(self, rng: random.Random, size: int) -> Plan:
        plan = Plan()
        for alias in self.distinct(rng, "name", size):
            name = self.value(rng, "person")
            fact, value = self._fact(rng)
            first = rng.choice(self.say["alias"]).format(name=name, alias=alias)
            group = plan.add([first, fact["says"].format(s=alias, v=value)], "spread")
            plan.ask("x_alias", fact["asks"].format(s=name), value, group)
        return plan

    def _x_ref(self, rng: random.Random, size: int) -> Plan:
        plan = Plan()
        for key in self.distinct(rng, "name", size):
            wording = rng.choice(self.say["reference"])
            owner, value = self.value(rng, wording["owner"]), self.value(rng, wording["value"])
            fill = {"key": key, "owner": owner, "v": value}
            group = plan.add([wording["first"].format(**fill), wording["second"].format(**fill)], "spread")
            plan.ask("x_ref", wording["asks"].format(**fill), value, group)
        return plan

    def _x_report(self, rng: random.Random, size: int) -> Plan:
        plan = Plan()
        for number in rng.sample(range(1000, 10000), size):
            wording, name = rng.choice(self.say["report"]), self.value(rng, "person")
            fact, value = self._fact(rng)
            said = fact["says"].format(s=wording["subject"], v=value)
            pieces = [wording["first"].format(id=number, name=name), wording["second"].format(id=number) + " " + said]
            plan.ask("x_report", fact["asks"].format(s=name), value, plan.add(pieces, "spread"))
        return plan

    def _x_pron(self, rng: random.Random, size: int) -> Plan:
        plan = Plan()
        for _ in range(size):
            name, pronoun = self.names.person(rng)
            facts = [(f, self.value(rng, f["value"])) for f in rng.sample(self.say["facts"], rng.randint(1, 3))]
            pieces = [rng.choice(self.say["pronoun"]).format(name=name)]
            pieces += [f["says"].format(s=pronoun, v=v) for f, v in facts]
            group = plan.add(pieces, "boundary")
            for fact, value in facts:
                plan.ask("x_pron", fact["asks"].format(s=name), value, group)
        return plan

    def _x_same(self, rng: random.Random, size: int) -> Plan:
        plan = Plan()
        for _ in range(size):
            wording = rng.choice(self.say["same"])
            value, hops = self.value(rng, wording["value"]), rng.randint(1, 3)
            names = self.distinct(rng, "name", hops + 1)
            pieces = [wording["root"].format(a=names[0], v=value)]
            pieces += [wording["link"].format(a=a, b=b) for a, b in zip(names[1:], names)]
            group = plan.add(pieces, "spread")
            plan.ask("x_same", wording["asks"].format(a=names[-1]), value, group)
        return plan

    def cloze(self, rng: random.Random, sentence: str) -> tuple[str, str] | None:
        """A question that hides a name, a number or a long word of the sentence; `None` where there is none."""
        words = sentence.split()
        bare = [w.strip(".,;:!?()\"'") for w in words]
        good = [i for i, w in enumerate(bare) if i > 0 and (w[:1].isupper() and len(w) > 2 or w.isdigit())]
        good = good or [i for i, w in enumerate(bare) if i > 0 and w.isalpha() and len(w) >= 7]
        if not good or len(words) < 6:
            return None
        at = rng.choice(good)
        low, high = max(0, at - rng.randint(4, 12)), min(len(words), at + rng.randint(4, 12))
        drop = rng.random() < 0.5
        shown = []
        for i in range(low, high):
            if i == at:
                shown.append(words[i].replace(bare[i], "____", 1))
            elif bare[i] != bare[at] and not (drop and rng.random() < 0.25):
                shown.append(words[i])
        return rng.choice(self.say["cloze"]).format(text=" ".join(shown)), bare[at]


NEEDLES = ("niah_single", "niah_multikey", "niah_uuid", "niah_multivalue", "niah_multiquery")
CROSSING = ("x_alias", "x_ref", "x_report", "x_pron", "x_same")
ALL = NEEDLES + ("kv", "vt") + CROSSING + ("cloze",)
