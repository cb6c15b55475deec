"""The texts that the bundled models `stories` and `chat` were trained on, from their sources.

    python examples/bundled_text.py stories stories_corpus.jsonl.zst stories.jsonl
    python examples/bundled_text.py chat chitchat.jsonl.zst chat.jsonl

`stories` expects documents with `text`, `kind` (tinystories, storybook, classic) and `source`;
`chat` expects conversations with `turns`, a list of strings by two people in turn. Each output has
one document a line, those for validation last. train.py reads stories in this order (`--order
sequential`).
"""
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pyarrow as pa

UNCERTAIN = {"mlschmitt/classic-books-markdown"}  # its licence is only the repository's own claim
CLASSIC_CHARACTERS = 6e6  # from the easiest classics
SIMPLE_PASSES = 4
TURN_CHARACTERS = 200  # conversations with longer turns on average are left out
UNSUITABLE = re.compile(
    r"\b(trump|obama|clinton|biden|democrats?|republicans?|politic\w*|hitler|nazi\w*|sex\w*|porn\w*"
    r"|drunk|drugs?|suicid\w*|kill\w*|murder\w*|rape\w*|guns?)\b")


def read_jsonl(path: Path) -> list[dict]:
    with pa.input_stream(str(path), compression="detect") as stream:
        return [json.loads(line) for line in stream.read().splitlines()]


def is_held_out(text: str) -> bool:
    """1% of the documents, chosen by a hash of their text, are for validation."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def take(texts: Iterable[str], characters: float) -> list[str]:
    """The first texts, up to the one that completes this many characters."""
    chosen, size = [], 0
    for text in texts:
        chosen.append(text)
        size += len(text)
        if size >= characters:
            break
    return chosen


def stories(documents: list[dict]) -> tuple[list[str], list[str]]:
    """(training, validation): simple stories and some easy classics, then simple stories only.

    How easy a classic is: the share of its words that simple stories use at least 20 times.
    """
    documents = [d for d in documents if d["source"] not in UNCERTAIN]
    simple = [d["text"] for d in documents if d["kind"] != "classic"]
    classics = [d["text"] for d in documents if d["kind"] == "classic"]
    counts = Counter(word for text in simple for word in words(text))
    known = {word for word, count in counts.items() if count >= 20}

    def ease(text: str) -> float:
        text_words = words(text)
        return sum(word in known for word in text_words) / max(1, len(text_words))

    # a sample of the easiest 20 MB of classics
    ranked = sorted(classics, key=ease, reverse=True)
    easy = take((text for text in ranked if not is_held_out(text)), 20e6)
    generator = random.Random(7)
    generator.shuffle(easy)
    chosen = take(reversed(easy), CLASSIC_CHARACTERS)

    # several passes over the simple stories, each in an order of its own
    training = [text for text in simple if not is_held_out(text)]
    passes = training + chosen
    generator.shuffle(passes)
    for _ in range(SIMPLE_PASSES - 1):
        passes += generator.sample(training, len(training))
    return passes, [text for text in simple if is_held_out(text)]


def chat(conversations: list[dict]) -> tuple[list[str], list[str]]:
    """(training, validation): each turn is a document, so that <|endoftext|> ends it, as in the
    chat template."""
    generator = random.Random(7)
    generator.shuffle(conversations)
    training, held_out = [], []
    for conversation in conversations:
        turns = [" ".join(turn.split()) for turn in conversation["turns"]]
        too_long = sum(map(len, turns)) > TURN_CHARACTERS * len(turns)
        if too_long or UNSUITABLE.search(" ".join(turns).lower()):
            continue
        lines = ["Two people chat."]
        for number, turn in enumerate(turns):
            speaker = "User" if number % 2 == 0 else "Bot"
            lines.append(f"{speaker}: {turn}")
        (held_out if is_held_out("\n".join(turns)) else training).append(lines)
    return list(chain(*training)), list(chain(*held_out))


def main(kind: str, source: str, out: str):
    training, held_out = {"stories": stories, "chat": chat}[kind](read_jsonl(Path(source)))
    with open(out, "w", encoding="utf-8") as file:
        for text in training + held_out:
            file.write(json.dumps({"text": text}) + "\n")
    val_share = len(held_out) / (len(training) + len(held_out))
    print(f"{out} is ready: python prepare.py {out} --val-share {val_share:.6f}")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("stories", "chat"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
