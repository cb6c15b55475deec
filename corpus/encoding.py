"""Documents into tokens, on all cores: the order and the bytes are the same for any number of processes."""
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from corpus import reader
from corpus.sources import split_of
from shards import check_ids, open_shard
from tokenizer import Tokenizer, load_tokenizer

COPY_TOKENS = 2**22
WINDOW = 48  # batches of reader.BLOCK_BYTES bytes that are read ahead: enough for a wait for the network


class Encoded(NamedTuple):
    """Tokens on their way to the disk."""
    tokens: np.ndarray
    starts: np.ndarray  # where documents start among them
    split: str | None
    cursor: reader.Cursor  # what comes next
    counts: dict  # bytes of text, documents that were left out and documents that were repaired
    unknown: str = ""  # characters that the alphabet lacks


@contextlib.contextmanager
def start_workers(workers: int, tokenizer: Tokenizer):
    """A pool of that many processes, which make themselves ready meanwhile; None where `workers` is 0."""
    if not workers:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), make_ready, (tokenizer.to_dict(),))
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes inherit: the parent answers Ctrl-C
    for _ in range(workers):
        pool.submit(int)  # starts a process
    signal.signal(signal.SIGINT, answer)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def make_ready(tokenizer: dict):
    """Loads the tokenizer in a worker, which ends with its parent, killed or not."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()
    load_tokenizer(tokenizer)


def tokenized(passages: Iterator[reader.Passage], tokenizer: Tokenizer, pool: ProcessPoolExecutor | None) -> Iterator[Encoded]:
    """The passages' tokens, in their order, made by the pool's processes; by this one without a pool."""
    encode_batch = functools.partial(encode, tokenizer.to_dict())
    if pool is None:
        yield from map(encode_batch, batches(passages))
        return
    window = deque()
    try:
        for batch in batches(passages):
            window.append(pool.submit(encode_batch, batch))
            if len(window) > WINDOW:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool:
        raise UserError("A tokenizing process died, perhaps for want of memory: give the same command again, with fewer "
                        "--workers; it goes on where this one stopped.") from None


def batches(passages: Iterator[reader.Passage]) -> Iterator[list[reader.Passage]]:
    """Passages of one split together, about reader.BLOCK_BYTES bytes of them."""
    batch, size = [], 0
    for passage in passages:
        if batch and (size + len(passage.content) > reader.BLOCK_BYTES or passage.split != batch[0].split):
            yield batch
            batch, size = [], 0
        batch.append(passage)
        size += len(passage.content)
    if batch:
        yield batch


def encode(tokenizer: dict, batch: list[reader.Passage]) -> Encoded:
    """The tokens of a batch; each document starts with <|endoftext|> where the tokenizer has one, and an empty one is
    left out."""
    tokenizer = load_tokenizer(tokenizer)
    parts, starts, length, counts, unknown = [np.empty(0, np.uint32)], [], 0, Counter(bytes=0), {}
    for passage in batch:
        text, whole = reader.text_of(passage)
        if passage.starts and not text.strip() and (passage.cursor[2] == 0 or not text):
            counts["empty"] += 1
            continue
        if passage.starts:
            starts.append(length)
            if tokenizer.eot is not None:
                parts.append([tokenizer.eot])
                length += 1
        text, lacking = tokenizer.replace_unknown(text)
        unknown |= dict.fromkeys(lacking)
        parts.append(tokenizer.encode_array(text))
        length += len(parts[-1])
        counts["bytes"] += len(text) if text.isascii() else len(text.encode())
        counts["repaired"] += passage.starts and not whole
    tokens = np.concatenate(parts).astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    return Encoded(tokens, np.array(starts, dtype=np.int64), batch[-1].split, batch[-1].cursor,
                   dict(counts), "".join(unknown))


def copied(files: list[str], cursor: reader.Cursor) -> Iterator[Encoded]:
    """The tokens of GPT-2 shards that others made, COPY_TOKENS at a time."""
    gpt2, step = load_tokenizer("gpt2"), COPY_TOKENS
    for index in range(cursor[0], len(files)):
        path = Path(files[index])
        tokens, split = open_shard(path), split_of(path)
        for block in range(cursor[1] if index == cursor[0] else 0, -(-len(tokens) // step)):
            piece = np.array(tokens[block * step:(block + 1) * step])
            check_ids(piece, gpt2.vocab_size, path)
            yield Encoded(piece, np.flatnonzero(piece == gpt2.eot), split, (index, block + 1, 0), {})
