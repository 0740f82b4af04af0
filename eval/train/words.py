"""Words, invented names and plain filler sentences that the task generators draw from.

A tenth of all words and names, chosen by a hash of their letters, is held out: training never shows one, evaluation
uses nothing else. The filler sentences keep a model that is trained on little text from learning the text by heart
as the background against which every planted fact stands out.
"""

import random
import zlib

FEMALE = """Ada Agnes Alma Beatrix Celia Clara Cora Delia Edith Elsa Erika Flora Greta Hanna Hilda Ines Irma Judith
Klara Lena Leonie Mabel Marta Minna Nadia Nora Olga Paula Petra Rhea Rosa Selma Silvia Tessa Thea Ursula Viola Wilma
Yvonne Zelda""".split()
MALE = """Adam Albert Anton Bruno Carl Conrad Cyril Edgar Emil Ernst Felix Franz Georg Gustav Hugo Igor Ivan Jonas
Julian Karl Leon Ludwig Magnus Max Milo Nils Oscar Otto Paul Piet Ralf Rolf Simon Stefan Theo Tobias Ulrich Victor
Walter Yannis""".split()

WORDS = """amber anchor apple arrow autumn badge balance bamboo barley basket beacon bitter blanket border bottle branch
bridge bronze bucket button cabin candle canvas carbon cargo carpet castle cedar chalk cherry circle citrus clover
cobalt comet copper coral cotton cradle crystal dagger dancer desert diamond dragon driver eager early eastern echo
elbow ember empty engine evening fabric falcon feather fiddle finger flame forest fossil frozen garden gentle ginger
glass golden granite gravel hammer harbor hazel helmet hidden hollow honey humble island ivory jacket jasmine jelly
journal juniper kettle kitchen ladder lantern leather lemon letter linen lively locket lumber magnet maple marble market
meadow mellow mirror mitten moment morning mustard narrow needle nickel noble nutmeg oaken olive onion orange orchard
oyster paddle paper parcel pebble pencil pepper pickle pillow pilot planet plaster pocket polite poplar potato powder
prairie puzzle quarter quiet rabbit radish rapid raven ribbon river rocket saddle salmon sandal scarlet season shadow
shallow silent silver simple single sleepy slender smooth socket spider spiral spoon spring square stable statue steady
stone stormy summer sunny supper tablet talent tender thimble thunder timber tiny tomato tower trumpet tulip tunnel
turnip velvet violet walnut warm water wheel willow window winter wisdom wooden yellow zinc""".split()

ADJECTIVES = """small large old new quiet broken narrow wide early late heavy light common rare simple careful local
distant ordinary useful empty crowded clean dusty bright dark""".split()
NOUNS = """garden teacher kitchen bridge carpenter harbour market window river train letter school orchestra farmer
library mountain clock village recipe lamp baker road doctor committee ship engine storm neighbour museum ticket bicycle
painter table forest map telescope battery journal factory island hospital""".split()
VERBS = """watched repaired described carried painted measured followed opened avoided remembered found needed replaced
studied sold ignored praised moved cleaned checked""".split()
PLACES = """near the station, behind the church, at the edge of town, in the valley, beside the canal, on the upper
floor, across the square, below the dam, outside the old walls, along the coast""".replace("\n", " ").split(", ")
TIMES = """in the morning, after lunch, for several weeks, every spring, until the rain stopped, before the holidays,
late in the evening, without much hurry, on most days, during the dry season""".replace("\n", " ").split(", ")
FILLER = (
    "The {a} {n} {v} the {m} {t}.",
    "{T}, the {n} {v} that {a} {m} {p}.",
    "Nobody {v} the {a} {n} {p}, although the {m} was {b}.",
    "The {n} {p} is often {a}, and the {m} is {b}.",
    "Most people say that the {a} {n} {v} the {m} because it was {b}.",
    "There was one {a} {n} {p}, and the {m} {v} it {t}.",
    "If the {n} is {a}, the {m} should be {b} as well.",
    "What the {n} {v} {t} was neither {a} nor {b}.",
    "It took some time until the {m} {p} was {a} again.",
    "Where the {n} had been {a}, the {m} {p} now seemed {b}.",
)

ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w z".split()
VOWELS = "a e i o u ai ea ia io ou".split()
CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "sk", "th", "lt"]


def held_out(word: str) -> bool:
    """True for the tenth of all words and names that only evaluation uses."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


class Names:
    """Draws words and names of one split: `evaluation=True` gives held-out ones, else all the others."""

    def __init__(self, evaluation: bool, extra_words: list[str] | None = None):
        pool = sorted(set(WORDS) | set(extra_words or []))
        self.evaluation = evaluation
        self.words = [w for w in pool if held_out(w) == evaluation]

    def pair(self, rng: random.Random) -> str:
        """Two words joined by a hyphen: a key."""
        return f"{rng.choice(self.words)}-{rng.choice(self.words)}"

    def invented(self, rng: random.Random, low: int = 2, high: int = 3) -> str:
        """An invented capitalised name of `low` to `high` syllables."""
        while True:
            parts = []
            for _ in range(rng.randint(low, high)):
                parts.append(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS))
            name = "".join(parts)
            if len(name) >= 4 and held_out(name) == self.evaluation:
                return name.capitalize()

    def person(self, rng: random.Random) -> tuple[str, str]:
        """A person's full name and pronoun. The first names are shared by both splits, the surnames are not."""
        female = rng.random() < 0.5
        first = rng.choice(FEMALE if female else MALE)
        return f"{first} {self.invented(rng)}", "She" if female else "He"


def filler_sentence(rng: random.Random) -> str:
    """One plain sentence without names and numbers."""
    time = rng.choice(TIMES)
    return rng.choice(FILLER).format(
        a=rng.choice(ADJECTIVES), b=rng.choice(ADJECTIVES), n=rng.choice(NOUNS), m=rng.choice(NOUNS),
        v=rng.choice(VERBS), p=rng.choice(PLACES), t=time, T=time[0].upper() + time[1:],
    )
