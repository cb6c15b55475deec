"""Encode documents on all cores; the tokens and their order do not depend on the number of threads.

`encode_passages` turns what corpus/reader.py reads into batches of tokens, which prepare.py hands
to corpus/shard_writer.py.
"""
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus import reader
from corpus.fast_bpe import BatchEncoder
from corpus.sources import split_of
from shards import check_ids, open_shard
from tokenizer import load_tokenizer

COPY_TOKENS = 2**22  # tokens that `copy_shards` copies at a time
READ_AHEAD = 32  # batches of reader.BLOCK_BYTES: threads encode them while the disk writes


class EncodedBatch(NamedTuple):
    """The tokens of a batch of passages."""
    tokens: np.ndarray  # (n,), uint16 or uint32
    starts: np.ndarray  # indices of the tokens that start a document
    split: str | None  # "train", "val", or None if the shard writer decides
    cursor: reader.Cursor  # where reading continues after the batch
    size: int  # bytes in the files: of the passages, or of the shards' tokens
    counts: dict[str, int]  # bytes of text, empty documents, repaired documents
    unknown: str = ""  # characters that the tokenizer lacks


def encode_passages(passages: Iterator[reader.Passage], encoder: BatchEncoder,
                    threads: int) -> Iterator[EncodedBatch]:
    """Encodes the passages in order, in batches that `threads` threads share."""
    pool = ThreadPoolExecutor(threads)
    pending = deque()
    try:
        for batch in batches(passages):
            pending.append(pool.submit(encode_batch, encoder, batch))
            if len(pending) > threads + READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(passages: Iterator[reader.Passage]) -> Iterator[list[reader.Passage]]:
    """Group consecutive passages of one split into batches of about reader.BLOCK_BYTES."""
    batch = []
    size = 0
    for passage in passages:
        full = size + passage.size > reader.BLOCK_BYTES
        if batch and (full or passage.split != batch[0].split):
            yield batch
            batch = []
            size = 0
        batch.append(passage)
        size += passage.size
    if batch:
        yield batch


def encode_batch(encoder: BatchEncoder, batch: list[reader.Passage]) -> EncodedBatch:
    """Encodes a batch.

    Each document starts with `<|endoftext|>` if the tokenizer has it. Empty documents are skipped.
    """
    tokenizer = encoder.tokenizer
    texts = []
    is_start = []
    counts = Counter(bytes=0)
    unknown = {}  # an ordered set
    for passage in batch:
        # skip an empty document (a long one that only starts with blanks has text, further on)
        text = passage.text
        whole_document = passage.cursor[2] == 0
        if passage.is_start and (not text or (whole_document and text.isspace())):
            counts["empty"] += 1
            continue
        text, replaced = tokenizer.replace_unknown(text)
        unknown |= dict.fromkeys(replaced)
        texts.append(text.encode())
        is_start.append(passage.is_start)
        counts["bytes"] += len(texts[-1])
        counts["repaired"] += passage.is_start and not passage.intact

    # replace the placeholders by <|endoftext|> where documents start, and remove the others
    ids, places = encoder.encode_batch(texts)
    is_start = np.array(is_start, dtype=bool)
    has_mark = tokenizer.eot is not None
    if has_mark:
        ids[places] = tokenizer.eot
    is_removed = ~(is_start & has_mark)
    tokens = np.delete(ids, places[is_removed])
    removed_before = np.cumsum(is_removed) - is_removed
    starts = (places - removed_before)[is_start]
    last = batch[-1]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return EncodedBatch(tokens.astype(dtype), starts, last.split, last.cursor,
                        sum(passage.size for passage in batch), dict(counts), "".join(unknown))


def copy_shards(files: list[str], cursor: reader.Cursor) -> Iterator[EncodedBatch]:
    """Reads the tokens of existing GPT-2 shards from `cursor` on, COPY_TOKENS at a time."""
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
            yield EncodedBatch(piece, starts, split, next_cursor, piece.nbytes, {})
