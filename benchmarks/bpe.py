"""Train a byte-level BPE and encode with it: time, memory, and tiktoken against `tokenizers`.

    python -m benchmarks.bpe CORPUS [--size 8192]

CORPUS is a file or folder that prepare.py reads. The first 20 MB are encoded in one process, each
way once per round.
"""
import resource
import statistics
import time
from pathlib import Path

import tyro

from benchmarks.rounds import time_in_rounds
from corpus import reader
from corpus.sources import local_source
from tokenizer import train_bpe

ENCODED_BYTES = 2e7


def main(path: tyro.conf.Positional[Path], size: int = 8192, rounds: int = 5):
    # train
    files = local_source(path.name, path).files
    began = time.perf_counter()
    bpe = train_bpe(reader.sample_texts(files, 0.0, None), size)
    seconds = time.perf_counter() - began
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"trained {bpe.vocab_size:,} ids in {seconds:.0f} s, at most {memory_mb:.0f} MB resident")

    # read the texts to encode
    texts, total_bytes = [], 0
    for passage in reader.read(files):
        texts.append(passage.text)
        total_bytes += len(passage.text.encode())
        if total_bytes > ENCODED_BYTES:
            break

    # encode them both ways, which must agree
    ways = {
        "tiktoken": lambda: [bpe.encode_array(text) for text in texts],
        "tokenizers": lambda: [bpe.bpe.encode(text, add_special_tokens=False).ids
                               for text in texts]}
    encoded = ways["tiktoken"]()
    assert [ids.tolist() for ids in encoded] == ways["tokenizers"]()
    print(f"{total_bytes / sum(map(len, encoded)):.2f} bytes per token")
    for name, seconds in time_in_rounds(ways, rounds, time.thread_time).items():
        print(f"{name:10} {total_bytes / statistics.median(seconds) / 1e6:5.1f} MB/s per core")


if __name__ == "__main__":
    tyro.cli(main)
