"""WordNet's words, definitions and examples, and which of them training may not see.

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
# An adjective's position in a sentence, "(a)", is marked behind the word.
MARKER = re.compile(r"\([a-z]+\)$")


@dataclass(frozen=True)
class Synset:
    """Words of one meaning, its definition, and sentences with one of the words."""

    id: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]

    @property
    def query(self) -> str:
        """The words as a person would look them up."""
        return ", ".join(self.words)


@dataclass(frozen=True)
class Split:
    """Disjoint synsets; no text of one part is a text of another.

    Attributes:
        embedder: The embedder is trained on these.
        reranker: Kept from the embedder, for a reranker to be trained on: what the embedder finds
            for them is as good and as bad as for new texts. They have no examples: those are too
            few to keep any from the embedder.
        words: Held out: words ask, definitions are the documents.
        definitions: Held out: definitions ask, examples are the documents.
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
            if not line.startswith(" "):  # the licence
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
    """Hold out `held_out` synsets a task, and a sixth of the rest for the reranker."""
    generator = random.Random(seed)
    usable = [each for each in synsets if len(each.definition.split()) >= 3]
    generator.shuffle(usable)
    # Synsets with an example are of words in use, not of botany.
    chosen = [each for each in usable if each.examples][: 2 * held_out]
    forbidden = {text for each in chosen for text in texts_of(each)}
    ids = {each.id for each in chosen}
    rest = [each for each in usable if each.id not in ids and forbidden.isdisjoint(texts_of(each))]
    fold = [each for each in rest[: len(rest) // 6] if not each.examples]
    kept = {each.id for each in fold}
    others = [each for each in rest if each.id not in kept]
    return Split(others, fold, chosen[:held_out], chosen[held_out:])


def texts_of(synset: Synset) -> tuple[str, ...]:
    """All that may be a query or a document of a synset."""
    return (synset.query, synset.definition, *synset.examples)
