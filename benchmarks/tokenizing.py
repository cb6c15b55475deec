"""How fast text becomes token shards, compared with other ways to do it.

    python -m benchmarks.tokenizing corpus.parquet    # or any text that prepare.py reads, 200 MB

Each round runs each way once, on all cores of this machine:
  prepare.py             the whole command, with Python's start, shards and checksums
  reading and encoding   pyarrow and json read the text, then gigatoken encodes it, in memory
  build-nanogpt's pool   as its fineweb.py: a pool of half the cores, documents through its pipes
  tokenizers             Hugging Face's encode_batch on all cores, the text in memory

The last two encode the first PART_BYTES of the text only, because they are slow.
"""
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gigatoken
import numpy as np
import tokenizers

import prepare
from benchmarks.ratio import divide, print_ratio
from corpus import reader, sources
from tokenizer import RANKS, load_tokenizer

ROUNDS = 3
CORES = prepare.available_cores()
PART_BYTES = 3e7
ROOT = Path(__file__).parents[1]


def main():
    path = Path(sys.argv[1])
    documents = read_bare(path)
    part, part_mb = [], 0.0
    for text in documents:
        if part_mb < PART_BYTES / 1e6:
            part.append(text)
            part_mb += len(text.encode()) / 1e6
    size_mb = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{size_mb:.0f} MB of text in {len(documents):,} documents, {CORES} cores")

    estimates = []
    ways = {
        "prepare.py": (size_mb, lambda: time_prepare(path, estimates)),
        "reading and encoding": (size_mb, lambda: time_bare(path)),
        "build-nanogpt's pool": (part_mb, lambda: time_pool(part)),
        "tokenizers": (part_mb, lambda: time_huggingface(part)),
    }
    speeds = {name: [] for name in ways}  # MB/s
    for number in range(ROUNDS):
        for name, (way_mb, way) in ways.items():
            speeds[name].append(way_mb / way())
            print(f"round {number + 1}: {name:20} {speeds[name][-1]:6.1f} MB/s", flush=True)

    for name in ways:
        print(f"{name:20} {statistics.median(speeds[name]):6.1f} MB/s")
        if name != "prepare.py":
            ratios = divide(speeds["prepare.py"], speeds[name])
            unit = "of" if name == "reading and encoding" else "times"
            print_ratio("text to shards by prepare.py", ratios, f"{unit} {name}")
    print_ratio("time that prepare.py predicts", estimates, "times its time")


# --------------------------------------------------------------------------------------------------
# The ways, each in seconds

def time_prepare(path: Path, estimates: list[float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, ROOT / "prepare.py", path, "--tokenizer", "gpt2",
                "--out", Path(folder) / "out"]
        began = time.perf_counter()
        done = subprocess.run(line, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True)
        seconds = time.perf_counter() - began
    number, unit = re.search(r"about ([\d.]+) (s|min)$", done.stdout, re.MULTILINE).groups()
    estimates.append(float(number) * (60 if unit == "min" else 1) / seconds)
    return seconds


def time_bare(path: Path) -> float:
    began = time.perf_counter()
    documents = read_bare(path)
    encoder = gigatoken.Tokenizer.from_tiktoken(RANKS, "gpt2", {})
    for first in range(0, len(documents), 4096):
        encoder.encode_batch(documents[first:first + 4096])  # on all cores
    return time.perf_counter() - began


def read_bare(path: Path) -> list[str]:
    """The documents, read with no checks."""
    documents = []
    for file in sources.local_source("", path).files:
        if sources.kind_of(file) == ".parquet":
            with reader.open_parquet(file) as table:
                for rows in table.iter_batches(columns=["text"]):
                    documents += rows.column(0).to_pylist()
        else:
            stream = reader.open_stream(file)
            documents += [json.loads(line)["text"] for line in stream]
    return documents


def time_pool(documents: list[str]) -> float:
    """Collects tokens in one array per shard, as build-nanogpt does; excludes the pool's start."""
    with multiprocessing.get_context("spawn").Pool(max(1, os.cpu_count() // 2)) as pool:
        pool.map(encode_document, ["start"] * CORES)
        began = time.perf_counter()
        shard, filled = np.empty(10**8, dtype=np.uint16), 0
        for tokens in pool.imap(encode_document, documents, chunksize=16):
            if filled + len(tokens) > len(shard):
                filled = 0
            shard[filled:filled + len(tokens)] = tokens
            filled += len(tokens)
        return time.perf_counter() - began


def encode_document(text: str) -> np.ndarray:
    gpt2 = load_tokenizer("gpt2")
    return np.array([gpt2.eot, *gpt2.fast.encode_ordinary(text)]).astype(np.uint16)


def time_huggingface(documents: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer("gpt2").save(Path(folder))
        tokenizer = tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    began = time.perf_counter()
    for first in range(0, len(documents), 1000):
        for encoding in tokenizer.encode_batch(documents[first:first + 1000]):
            np.array(encoding.ids, dtype=np.uint16)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
