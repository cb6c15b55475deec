"""How fast text becomes token shards, compared with other ways to do it.

    python -m benchmarks.tokenizing corpus.jsonl.zst    # or any text that prepare.py reads, 200 MB

Each round runs each way once, on all cores of this machine:
  prepare.py             everything: start the processes, read the corpus, write shards and manifest
  bare tokenizer calls   one process per core calls tiktoken on its share of the text, in memory
  build-nanogpt's pool   as its fineweb.py: a pool of half the cores, documents through its pipes
  tokenizers             Hugging Face's encode_batch on all cores, the text in memory
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
from benchmarks.ratio import print_ratio
from corpus import reader, sources
from tokenizer import load_tokenizer

ROUNDS = 5
CORES = prepare.available_cores()


def main():
    path = Path(sys.argv[1])
    files = sources.local_source("", path).files
    documents = [reader.passage_text(passage)[0] for passage in reader.read(files)]
    size_mb = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{size_mb:.0f} MB of text in {len(documents):,} documents, {CORES} cores")

    ways = {
        "bare tokenizer calls": lambda: time_bare_calls(documents),
        "prepare.py": lambda: time_prepare(path),
        "build-nanogpt's pool": lambda: time_pool(documents),
        "tokenizers": lambda: time_huggingface(documents),
    }
    speeds = {name: [] for name in ways}  # MB/s
    for number in range(ROUNDS):
        for name, way in ways.items():
            speeds[name].append(size_mb / way())
            print(f"round {number + 1}: {name:20} {speeds[name][-1]:6.1f} MB/s", flush=True)

    for name in ways:
        print(f"{name:20} {statistics.median(speeds[name]):6.1f} MB/s")
        if name != "prepare.py":
            ratios = [ours / other for ours, other in zip(speeds["prepare.py"], speeds[name])]
            print_ratio("text to shards by prepare.py", ratios, f"times {name}")


# --------------------------------------------------------------------------------------------------
# The ways, each in seconds

def time_prepare(path: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        prepare.main(prepare.PrepareConfig(str(path), "gpt2", out=Path(folder) / "out"))
        return time.perf_counter() - began


def time_bare_calls(documents: list[str]) -> float:
    """The mean over the processes, without their start."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(CORES), context.Queue()
    processes = [
        context.Process(target=encode_share, args=(documents[i::CORES], barrier, times))
        for i in range(CORES)]
    for process in processes:
        process.start()
    seconds = statistics.mean(times.get() for _ in processes)
    for process in processes:
        process.join()
    return seconds


def encode_share(documents: list[str], barrier, times):
    encode = load_tokenizer("gpt2").fast.encode_ordinary
    barrier.wait()
    began = time.perf_counter()
    for text in documents:
        encode(text)
    times.put(time.perf_counter() - began)


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
