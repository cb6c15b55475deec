"""A byte-level BPE of our own: how long its training takes, what memory, and how fast it encodes by tiktoken and by `tokenizers`.

    python -m benchmarks.bpe CORPUS [--size 8192]

CORPUS is a file or folder as prepare.py takes it; the first 20 MB of it are encoded, in one process, each way once a round.
"""


import resource
import statistics
import time
from pathlib import Path

import tyro

from corpus import reader
from corpus.sources import local_source
from tokenizer import train_bpe


def main(path: tyro.conf.Positional[Path], size: int = 8192, rounds: int = 5):
    files = local_source(path.name, path).files
    began = time.perf_counter()
    bpe = train_bpe(reader.sample(files, 0.0, None), size)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"trained {bpe.vocab_size:,} ids in {time.perf_counter() - began:.0f} s, at most {memory:.0f} MB resident")
    texts, length = [], 0
    for passage in reader.read(files):
        texts.append(reader.text_of(passage)[0])
        length += len(texts[-1].encode())
        if length > 2e7:
            break
    ways = {"tiktoken": bpe.encode_array, "tokenizers": lambda text: bpe.bpe.encode(text, add_special_tokens=False).ids}
    assert all(list(ways["tiktoken"](text)) == ways["tokenizers"](text) for text in texts[:200])
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, encode in ways.items():
            began = time.thread_time()
            tokens = sum(len(encode(text)) for text in texts)
            taken[name].append(time.thread_time() - began)
    print(f"{length / tokens:.2f} bytes a token")
    for name, seconds in taken.items():
        print(f"{name:10} {length / statistics.median(seconds) / 1e6:5.1f} MB/s of one core")


if __name__ == "__main__":
    tyro.cli(main)
