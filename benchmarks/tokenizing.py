"""How fast text becomes token shards, beside what else a person would use.

    python -m benchmarks.tokenizing reader.jsonl.zst           # or whatever prepare.py reads; 200 MB are enough

Every round does each way once, on all cores of this machine:
  bare           a process a core, each with its share of the text in memory, calls tiktoken and does nothing else
  prepare.py     all of it: reading the corpus from the disk, the processes' start, shards, checksums and manifest
  half a pool    as build-nanogpt's fineweb.py: a pool of half the cores, documents and arrays through its pipes
  tokenizers     Hugging Face's library, encode_batch on all cores, the text in memory
"""
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers

import prepare
from corpus import reader, sources
from tokenizer import load_tokenizer

ROUNDS = 5
CORES = prepare.cores()


def encode_share(documents: list[str], barrier, times):
    encode = load_tokenizer("gpt2").fast.encode_ordinary
    barrier.wait()
    began = time.perf_counter()
    for text in documents:
        encode(text)
    times.put(time.perf_counter() - began)


def bare(documents: list[str]) -> float:
    """Seconds of the tokenizer alone."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(CORES), context.Queue()
    processes = [context.Process(target=encode_share, args=(documents[i::CORES], barrier, times)) for i in range(CORES)]
    for process in processes:
        process.start()
    seconds = statistics.mean(times.get() for _ in processes)
    for process in processes:
        process.join()
    return seconds


def whole(path: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        prepare.main(prepare.PrepareConfig(str(path), "gpt2", out=Path(folder) / "out"))
        return time.perf_counter() - began


def encode_array(text: str) -> np.ndarray:
    gpt2 = load_tokenizer("gpt2")
    return np.array([gpt2.eot, *gpt2.fast.encode_ordinary(text)]).astype(np.uint16)


def half_a_pool(documents: list[str]) -> float:
    """build-nanogpt collects the arrays in one for each shard; the processes' start is left out here."""
    with multiprocessing.get_context("spawn").Pool(max(1, os.cpu_count() // 2)) as pool:
        pool.map(encode_array, ["start"] * CORES)
        began, shard, filled = time.perf_counter(), np.empty(10**8, dtype=np.uint16), 0
        for tokens in pool.imap(encode_array, documents, chunksize=16):
            filled = 0 if filled + len(tokens) > len(shard) else filled
            shard[filled:filled + len(tokens)] = tokens
            filled += len(tokens)
        return time.perf_counter() - began


def huggingface(documents: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer("gpt2").save(Path(folder))
        tokenizer = tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    began = time.perf_counter()
    for first in range(0, len(documents), 1000):
        for encoding in tokenizer.encode_batch(documents[first:first + 1000]):
            np.array(encoding.ids, dtype=np.uint16)
    return time.perf_counter() - began


def main():
    path = Path(sys.argv[1])
    documents = [reader.text_of(passage)[0] for passage in reader.read(sources.local_source('', path).files)]
    size = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{size:.0f} MB of text in {len(documents):,} documents, {CORES} cores")
    ways = {"bare": lambda: bare(documents), "prepare.py": lambda: whole(path), "half a pool": lambda: half_a_pool(documents),
            "tokenizers": lambda: huggingface(documents)}
    rates = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name, work in ways.items():
            rates[name].append(size / work())
            print(f"round {number + 1}: {name:12} {rates[name][-1]:6.1f} MB/s", flush=True)
    for name in ways:
        ratio = statistics.median(mine / other for mine, other in zip(rates["prepare.py"], rates[name]))
        print(f"{name:12} {statistics.median(rates[name]):6.1f} MB/s")
        if name != "prepare.py":
            print(f"= {ratio:.2f} text into shards by prepare.py against {name}")


if __name__ == "__main__":
    main()
