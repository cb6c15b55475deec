"""Batches out of token shards, in an order that nothing but the seed decides.

    loader = DataLoader("data/tiny_shakespeare_char", "train", batch_size=64, block_size=256, seed=1337)
    x, y = loader.batch(step)                   # (batch_size / world, block_size) int64 each

All shards of a split form one stream of N tokens. An epoch has floor((N-1) / block_size) sequences, each once, in a
permutation of its own; the tail that fills no sequence is left out. Sequence `position` of global batch `step` is a
pure function of (seed, step, position): ranks and micro-batches only divide it, so 1, 2, 4 and 8 processes see the
same tokens in the same order, and a run resumes on another number of processes without a cursor to save.
"""
import hashlib

import numpy as np
import torch

from errors import UserError
from shards import Shards


class DataLoader:
    """The batches of one split, of `batch_size` sequences over all ranks; raises UserError where they cannot be had."""

    def __init__(self, data, split: str, batch_size: int, block_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.shards = Shards(data, split)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world = rank, world
        self.sequences, self.tail = divmod(len(self.shards) - 1, block_size)  # sequences an epoch, tokens left out
        if self.sequences < 1:
            raise UserError(f"The {split} split of {data} has {len(self.shards):,} tokens, fewer than one sequence of "
                            f"{block_size} and its next token: use a smaller --block-size or more text.")
        if batch_size % world:
            raise UserError(f"A batch of {batch_size} sequences does not divide among {world} processes.")

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of global batch `step`: inputs x and the tokens that follow them y, (B / world, T) int64."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        return self.read(self.order(np.arange(first, first + share)))

    def read(self, sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y of the sequences with these indices in the stream, 0 to `self.sequences`-1; (len, T) int64 each."""
        T = self.block_size
        tokens = torch.from_numpy(np.stack([self.shards.read(i * T, i * T + T + 1) for i in sequences]).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Sequence indices at these positions of the endless training order, epoch after epoch."""
        epochs, places = np.divmod(positions, self.sequences)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(places[here], self.sequences, f"{self.seed} {epoch}")
        return indices


FEISTEL_ROUNDS = 6


def permute(places: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a permutation of range(n), chosen by `key`, sends `places`: in constant memory for any n.

    A Feistel network permutes the smallest 2^(2h) >= n; what lands past n walks on until it lands below
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", cycle walking).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low = np.uint64(2**half - 1)
    keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")[:FEISTEL_ROUNDS]
    out, walking = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while walking.any():
        left, right = out[walking] >> np.uint64(half), out[walking] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        out[walking] = left << np.uint64(half) | right
        walking = out >= n
    return out.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of the uint64 result depends on every bit of x (Steele et al. 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
