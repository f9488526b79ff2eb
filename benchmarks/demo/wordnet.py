"""WordNet's words, definitions and examples, split into training and held-out synsets.

Source: WordNet 3.0's database files (Debian package `wordnet-base`; format: wndb(5WN)).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
EXAMPLE = re.compile(r'"([^"]+)"')
# Adjectives may end with a marker of their position in a sentence, such as "(a)".
MARKER = re.compile(r"\([a-z]+\)$")


@dataclass(frozen=True)
class Synset:
    """Words with one meaning, its definition, and example sentences."""

    id: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]

    @property
    def query(self) -> str:
        """The words, joined into a query."""
        return ", ".join(self.words)


@dataclass(frozen=True)
class Split:
    """Disjoint synsets; no text of one part is a text of another.

    Attributes:
        embedder: Training data of the embedder.
        reranker: Training data of the reranker, unseen by the embedder, which therefore ranks it as
            it ranks new texts. Without examples: these are few, and the embedder needs all.
        words: Held out: words are queries, definitions are documents.
        definitions: Held out: definitions are queries, examples are documents.
    """

    embedder: list[Synset]
    reranker: list[Synset]
    words: list[Synset]
    definitions: list[Synset]


def read_synsets(folder: Path = FOLDER) -> list[Synset]:
    """All synsets, in the files' order."""
    synsets = []
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):  # lines of the licence start with a space
                synsets.append(_parse(part, line))
    return synsets


def _parse(part: str, line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    offset, _, _, count, *rest = fields.split(" ")
    words = [MARKER.sub("", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
    definition = gloss.split('"')[0].strip().rstrip(";:, ")
    examples = tuple(e.strip(" ;") for e in EXAMPLE.findall(gloss) if len(e.split()) >= 4)
    return Synset(f"{part}-{offset}", tuple(dict.fromkeys(words)), definition, examples)


def split_synsets(synsets: list[Synset], held_out: int, seed: int) -> Split:
    """Hold out `held_out` synsets per task, and keep a sixth of the rest for the reranker."""
    generator = random.Random(seed)
    usable = [synset for synset in synsets if len(synset.definition.split()) >= 3]
    generator.shuffle(usable)
    # Synsets with examples have common words rather than, say, botanical terms.
    chosen = [synset for synset in usable if synset.examples][: 2 * held_out]
    forbidden = {text for synset in chosen for text in texts_of(synset)}
    ids = {synset.id for synset in chosen}
    rest = [
        synset
        for synset in usable
        if synset.id not in ids and forbidden.isdisjoint(texts_of(synset))
    ]
    fold = [synset for synset in rest[: len(rest) // 6] if not synset.examples]
    fold_ids = {synset.id for synset in fold}
    others = [synset for synset in rest if synset.id not in fold_ids]
    return Split(others, fold, chosen[:held_out], chosen[held_out:])


def texts_of(synset: Synset) -> tuple[str, ...]:
    """All texts of a synset that may be a query or a document."""
    return (synset.query, synset.definition, *synset.examples)
