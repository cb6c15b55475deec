"""The small valid inputs that the fuzzers damage, and how they damage files."""
import contextlib
import json
import random
from pathlib import Path

import numpy as np
from mutations import damaged_json, mutate

from corpus.shard_writer import ShardWriter
from tokenizer import CharTokenizer

TEXT = "The fox went out, and prayed for the moon.\n" * 3
LETTERS = "\n abc"
CHARS = CharTokenizer(LETTERS)
VALID = "still valid"


def prepared_data(folder: str) -> Path:
    """A folder of two shards with 100 tokens each."""
    folder = Path(folder)
    tokens = np.arange(200) % len(LETTERS)
    with ShardWriter(folder, "x", CHARS, {"name": "x", "revision": "r"},
                     shard_tokens=100) as writer:
        writer.append(tokens, np.array([0, 150]))
        writer.finish()
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damaged(path: Path, content: bytes, source: random.Random) -> bytes:
    """A file's content, damaged as bytes or as the JSON document that it is."""
    if path.suffix == ".json":
        return damaged_json(content, json.loads(content), source)
    return mutate(content, source)


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    """Gives a file another content within a `with` block."""
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        if original is None:
            path.unlink()
        else:
            path.write_bytes(original)
