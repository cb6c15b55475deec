"""Batches out of token shards, in an order that nothing but the seed decides.

    loader = DataLoader("data/tiny_shakespeare_char", "train", batch_size=64, block_size=256, seed=1337)
    x, y = loader.batch(step)                                        # (batch_size / world, block_size) int64 each
    for x, y in loader.batches(first_step, last_step, device):       # the same, read ahead in the background

All shards of a split form one stream of N tokens. An epoch has floor((N-1) / block_size) sequences, each once, in a
permutation of its own; the tail that fills no sequence is left out. Sequence `position` of global batch `step` is a
pure function of (seed, step, position): ranks and micro-batches only divide it, so 1, 2, 4 and 8 processes see the
same tokens in the same order, and a run resumes on another number of processes without a cursor to save.
"""
import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from common.errors import UserError
from shards import Shards, check_ids, read_tokenizer

AHEAD = 2  # batches read in the background
ORDER_BLOCK = 4096  # entries of the order computed together


class DataLoader:
    """The batches of one split, of `batch_size` sequences over all ranks; raises UserError where they cannot be had.

    `order` is "shuffled", or "sequential" for the order of the text.
    """

    def __init__(self, data, split: str, batch_size: int, block_size: int, seed: int = 0, rank: int = 0, world: int = 1,
                 order: Literal["shuffled", "sequential"] = "shuffled"):
        self.data, self.shards, self.vocab_size = data, Shards(data, split), read_tokenizer(data).vocab_size
        self.batch_size, self.block_size, self.seed, self.order = batch_size, block_size, seed, order
        self.rank, self.world = rank, world
        self.sequences, self.tail = divmod(len(self.shards) - 1, block_size)  # sequences an epoch, tokens left out
        if self.sequences < 1:
            raise UserError(f"The {split} split of {data} has {len(self.shards):,} tokens, fewer than one sequence of "
                            f"{block_size} and its next token: use a smaller --block-size or more text.")
        if batch_size % world:
            raise UserError(f"A batch of {batch_size} sequences does not divide among {world} processes.")

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of global batch `step`: inputs x and the tokens that follow them y, (B / world, T) int64."""
        return split_targets(self.tokens(self.batch_sequences(step)))

    def batches(self, start: int, stop: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`batch(step)` for the steps start to stop-1, on `device`; the next ones are read meanwhile."""
        def fetch(step: int) -> torch.Tensor:
            tokens = self.tokens(self.batch_sequences(step))
            return tokens.pin_memory() if device.type == "cuda" else tokens  # pinned memory is copied in the background
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(fetch, step) for step in range(start, min(start + AHEAD, stop)))
            for step in range(start, stop):
                tokens = ahead.popleft().result().to(device, non_blocking=True)
                if step + AHEAD < stop:
                    ahead.append(reader.submit(fetch, step + AHEAD))
                yield split_targets(tokens)

    def read(self, sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y of the sequences with these indices in the stream, 0 to `self.sequences`-1; (len, T) int64 each."""
        return split_targets(self.tokens(sequences))

    def tokens(self, sequences) -> torch.Tensor:
        """The sequences with these indices, each with the token that follows it: (len, T + 1) int64."""
        T = self.block_size
        tokens = np.empty((len(sequences), T + 1), dtype=np.int64)
        for row, i in zip(tokens, map(int, sequences)):
            row[:] = self.shards.read(i * T, i * T + T + 1)
        check_ids(tokens, self.vocab_size, self.data)
        return torch.from_numpy(tokens)

    def batch_sequences(self, step: int) -> np.ndarray:
        """Indices of the sequences of this rank's part of global batch `step`."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        if self.order == "sequential":
            return np.arange(first, first + share) % self.sequences
        blocks = range(first // ORDER_BLOCK, (first + share - 1) // ORDER_BLOCK + 1)
        indices = np.concatenate([shuffled(self.sequences, self.seed, block) for block in blocks])
        return indices[first % ORDER_BLOCK:][:share]


def split_targets(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens[:, :-1], tokens[:, 1:]


@functools.lru_cache(8)
def shuffled(n: int, seed: int, block: int) -> np.ndarray:
    """Entries block * ORDER_BLOCK to (block + 1) * ORDER_BLOCK - 1 of the endless order: epochs, each a permutation of
    range(n). A block costs hardly more than one entry would."""
    epochs, places = np.divmod(np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK), n)
    epochs, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([round_keys(f"{seed} {epoch}") for epoch in epochs], axis=1)
    return permute(places, n, keys[:, which])


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of range(n), chosen by `keys` (rounds, 1 or len(places)), sends `places`: in constant memory.

    A Feistel network permutes the smallest 2^(2h) >= n; what lands past n walks on until it lands below
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", cycle walking). Unlike a shuffle of blocks it can
    bring any two sequences together, and unlike an affine map it leaves no lattice.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low, keys = np.uint64(2**half - 1), np.broadcast_to(keys, (len(keys), len(places)))
    out, walking = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while walking.any():
        left, right = out[walking] >> np.uint64(half), out[walking] & low
        for round_key in keys[:, walking]:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        out[walking] = left << np.uint64(half) | right
        walking = out >= n
    return out.astype(np.int64)


def round_keys(name: str) -> np.ndarray:
    """Six uint64 for the rounds of `permute`."""
    return np.frombuffer(hashlib.sha512(name.encode()).digest(), dtype="<u8")[:6]


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of the uint64 result depends on every bit of x (Steele et al. 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
