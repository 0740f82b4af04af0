"""Trains the byte-level BPE tokenizer, or reuses one.

Digits are split singly, so that numbers are copied digit by digit; the six special tokens have fixed ids.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from words import Names

PAD, BOS, EOS, CHUNK, QUESTION, ANSWER = range(6)
SPECIAL = ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|chunk|>", "<|question|>", "<|answer|>"]
VOCABULARY = 7168


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE over `texts`; at most `vocabulary` entries, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    check(tokenizer)
    return tokenizer


def name_samples(names: Names, count: int, seed: int = 0) -> list[str]:
    """Invented names, so that their syllables become tokens too."""
    rng = random.Random(seed)
    return [f"{names.person(rng)[0]} {names.invented(rng)} {names.pair(rng)}." for _ in range(count)]


def load_tokenizer(path: Path) -> Tokenizer:
    """An existing `tokenizer.json` whose special tokens have the expected ids."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check(tokenizer)
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """Raises `ValueError` unless special tokens, digits and round trips are as the prompt format needs them."""
    for index, token in enumerate(SPECIAL):
        if tokenizer.token_to_id(token) != index:
            raise ValueError(f"expected {token} at id {index}, found {tokenizer.token_to_id(token)}")
    sample = "On 12 May, 4711 copper-lanterns (ß, 光)."
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    if tokenizer.decode(ids) != sample:
        raise ValueError("the tokenizer does not give back the text it encoded: it must be byte-level")
    if len(tokenizer.encode("4711", add_special_tokens=False).ids) != 4:
        raise ValueError("the tokenizer must split digits singly")


def write_config(folder: Path, context: int) -> None:
    """`tokenizer_config.json` beside a `tokenizer.json`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "additional_special_tokens": SPECIAL[CHUNK:],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
