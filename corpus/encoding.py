"""Encode documents on all cores; the tokens and their order do not depend on the number of cores.

`encode_passages` turns what corpus/reader.py reads into batches of tokens, which prepare.py hands
to corpus/shard_writer.py.
"""
import contextlib
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

COPY_TOKENS = 2**22  # tokens that `copy_shards` copies at a time
# batches of reader.BLOCK_BYTES that are read ahead, enough to bridge a pause of the network
READ_AHEAD = 48

worker_tokenizer: Tokenizer | None = None  # in a worker process: loaded once, by init_worker


class EncodedBatch(NamedTuple):
    """The tokens of a batch of passages."""
    tokens: np.ndarray  # (n,), uint16 or uint32
    starts: np.ndarray  # indices of the tokens that start a document
    split: str | None  # "train", "val", or None if the shard writer decides
    cursor: reader.Cursor  # where reading continues after the batch
    counts: dict[str, int]  # bytes of text, empty documents, repaired documents
    unknown: str = ""  # characters that the tokenizer lacks


# --------------------------------------------------------------------------------------------------
# The pool of processes

@contextlib.contextmanager
def start_workers(workers: int, tokenizer: Tokenizer):
    """A pool of processes that load the tokenizer in the background; None if `workers` is 0."""
    if not workers:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, init_worker, (tokenizer.to_dict(),))

    # start the processes, which inherit that Ctrl-C is ignored: only the parent handles it
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(int)  # each submission starts a process
    signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def init_worker(description: dict):
    """Load the tokenizer in a worker process, and exit when the parent exits or is killed."""
    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()

    global worker_tokenizer  # noqa: PLW0603 (the only way to pass it to the tasks of a pool)
    worker_tokenizer = load_tokenizer(description)


def encode_in_worker(batch: list[reader.Passage]) -> EncodedBatch:
    return encode_batch(worker_tokenizer, batch)


def encode_passages(passages: Iterator[reader.Passage], tokenizer: Tokenizer,
                    pool: ProcessPoolExecutor | None) -> Iterator[EncodedBatch]:
    """Encode the passages in order, in the pool's processes or, without a pool, in this one."""
    if pool is None:
        for batch in batches(passages):
            yield encode_batch(tokenizer, batch)
        return
    pending = deque()
    try:
        for batch in batches(passages):
            pending.append(pool.submit(encode_in_worker, batch))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("A tokenizing process died, perhaps because memory ran out: run the same "
                        "command with fewer --workers to resume.") from None


# --------------------------------------------------------------------------------------------------
# Encoding

def batches(passages: Iterator[reader.Passage]) -> Iterator[list[reader.Passage]]:
    """Group consecutive passages of one split into batches of about reader.BLOCK_BYTES."""
    batch = []
    size = 0
    for passage in passages:
        full = size + len(passage.content) > reader.BLOCK_BYTES
        if batch and (full or passage.split != batch[0].split):
            yield batch
            batch = []
            size = 0
        batch.append(passage)
        size += len(passage.content)
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: list[reader.Passage]) -> EncodedBatch:
    """Encode a batch.

    Each document starts with `<|endoftext|>` if the tokenizer has it. Empty documents are skipped.
    """
    pieces = [np.empty(0, np.uint32)]
    starts = []
    length = 0
    counts = Counter(bytes=0)
    unknown = {}  # an ordered set
    for passage in batch:
        text, intact = reader.passage_text(passage)

        # skip an empty document (a long one that only starts with blanks has text, further on)
        whole_document = passage.cursor[2] == 0
        if passage.is_start and not text.strip() and (whole_document or not text):
            counts["empty"] += 1
            continue

        # mark the start of a document
        if passage.is_start:
            starts.append(length)
            if tokenizer.eot is not None:
                pieces.append([tokenizer.eot])
                length += 1

        text, replaced = tokenizer.replace_unknown(text)
        unknown |= dict.fromkeys(replaced)
        pieces.append(tokenizer.encode_array(text))
        length += len(pieces[-1])
        counts["bytes"] += len(text) if text.isascii() else len(text.encode())
        counts["repaired"] += passage.is_start and not intact

    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    tokens = np.concatenate(pieces).astype(dtype)
    last = batch[-1]
    return EncodedBatch(tokens, np.array(starts, dtype=np.int64), last.split, last.cursor,
                        dict(counts), "".join(unknown))


def copy_shards(files: list[str], cursor: reader.Cursor) -> Iterator[EncodedBatch]:
    """Read the tokens of existing GPT-2 shards from `cursor` on, COPY_TOKENS at a time."""
    gpt2 = load_tokenizer("gpt2")
    for index in range(cursor[0], len(files)):
        path = Path(files[index])
        split = split_of(path)
        tokens = open_shard(path)
        first = cursor[1] if index == cursor[0] else 0
        for begin in range(first * COPY_TOKENS, len(tokens), COPY_TOKENS):
            piece = np.array(tokens[begin:begin + COPY_TOKENS])
            check_ids(piece, gpt2.vocab_size, path)
            starts = np.flatnonzero(piece == gpt2.eot)
            next_cursor = (index, begin // COPY_TOKENS + 1, 0)
            yield EncodedBatch(piece, starts, split, next_cursor, {})
