"""Batches from token shards, in a shuffled order that depends only on the seed.

    loader = DataLoader("data/tiny_shakespeare_char", "train", batch_size=64, block_size=256)
    x, y = loader.batch(step)                                    # (batch_size / world, block_size)
    for x, y in loader.batches(first_step, last_step, device):   # the same, prefetched

Three steps lead to a batch of B sequences with T tokens each:

1. All shards of a split form one stream of N tokens. Sequence i holds the tokens i*T to i*T + T;
   the last of them is only a target. There are S = floor((N - 1) / T) sequences, and the few
   tokens after the last sequence are not used.
2. An epoch reads each sequence once, in a permutation of range(S) that depends on (seed, epoch).
   One epoch follows another: position p of this endless order is entry p mod S of the permutation
   of epoch floor(p / S).
3. Global batch `step` takes the positions step*B to step*B + B - 1. With W ranks, rank r takes the
   r-th of W equal parts of them.

So a batch is a pure function of (seed, step, position), and ranks and micro-batches only divide it.
Any number of processes sees the same tokens in the same order, and a run can resume at any step, on
any number of processes, without a saved state of the loader.

The permutation is computed, not stored: see `permute`.

With order="documents" an epoch first puts the documents into a new order, and then cuts and
shuffles sequences. Otherwise every epoch has the same sequences, with the same neighbors in them.
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

PREFETCH = 2  # batches read ahead in the background
ORDER_CHUNK = 4096  # positions of the order computed at a time

Order = Literal["shuffled", "documents", "sequential"]


class DataLoader:
    """The batches of one split. A batch has `batch_size` sequences over all ranks.

    `order` is "shuffled", "documents" to shuffle the documents before the sequences, or
    "sequential" to read the sequences in the order of the text. Raises UserError if the data are
    missing, too short for one sequence, or without `<|endoftext|>` if `order` needs it, or if the
    batch does not divide evenly among the `world` ranks.
    """

    def __init__(self, data, split: str, batch_size: int, block_size: int, seed: int = 0,
                 rank: int = 0, world: int = 1, order: Order = "shuffled",
                 manifest: dict | None = None):
        self.data = data
        self.shards = Shards(data, split, manifest)
        tokenizer = read_tokenizer(data, manifest)
        self.vocab_size = tokenizer.vocab_size
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.order = order
        # count the sequences of an epoch, and the tokens left over at the end
        self.sequences, self.tail = divmod(len(self.shards) - 1, block_size)
        if self.sequences < 1:
            raise UserError(
                f"The {split} split of {data} has {len(self.shards):,} tokens, fewer than one "
                f"sequence of {block_size} and its next token: use a smaller --block-size or more "
                "text.")
        if batch_size % world:
            raise UserError(
                f"A batch of {batch_size} sequences does not divide evenly among {world} "
                "processes: change --batch-tokens or the number of processes.")

        # the tokens that an epoch cuts into sequences
        self.stream = lambda epoch: self.shards
        if order == "documents":
            if tokenizer.eot is None:
                raise UserError(f"The tokenizer of {data} has no <|endoftext|>, which --order "
                                "documents needs: use --order shuffled.")
            starts = find_documents(self.shards, tokenizer.eot)
            self.stream = functools.lru_cache(1)(
                lambda epoch: ShuffledDocuments(self.shards, starts, f"{seed} documents {epoch}"))

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of global batch `step`: inputs x and targets y, (B / world, T) int64."""
        return self.read(self.sequence_indices(step))

    def batches(self, start: int, stop: int,
                device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields `batch(step)` on `device` for the steps start to stop - 1, reading ahead."""
        def fetch(step: int) -> torch.Tensor:
            tokens = self.tokens(self.sequence_indices(step))
            # only pinned memory can be copied to the GPU in the background
            return tokens.pin_memory() if device.type == "cuda" else tokens

        with ThreadPoolExecutor(1) as reader:
            first_steps = range(start, min(start + PREFETCH, stop))
            pending = deque(reader.submit(fetch, step) for step in first_steps)
            for step in range(start, stop):
                tokens = pending.popleft().result().to(device, non_blocking=True)
                if step + PREFETCH < stop:
                    pending.append(reader.submit(fetch, step + PREFETCH))
                yield split_targets(tokens)

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of the sequences with these indices in the stream, (len(indices), T) int64."""
        return split_targets(self.tokens(indices))

    def tokens(self, indices) -> torch.Tensor:
        """The sequences with these indices, each with the token after it: (len(indices), T + 1).

        Indices continue from epoch to epoch: sequence i of epoch e has the index e * S + i.
        """
        T = self.block_size
        tokens = np.empty((len(indices), T + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            epoch, i = divmod(int(index), self.sequences)
            tokens[row] = self.stream(epoch).read(i * T, i * T + T + 1)
        check_ids(tokens, self.vocab_size, self.data)
        return torch.from_numpy(tokens)

    def sequence_indices(self, step: int) -> np.ndarray:
        """The indices of this rank's sequences in global batch `step`, (B / world,) int64."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share  # position in the endless order
        if self.order == "sequential":
            return np.arange(first, first + share)

        # compute the chunks of the order that hold the positions, then cut the positions out
        first_chunk = first // ORDER_CHUNK
        last_chunk = (first + share - 1) // ORDER_CHUNK
        order = np.concatenate([shuffled_chunk(self.sequences, self.seed, chunk)
                                for chunk in range(first_chunk, last_chunk + 1)])
        offset = first - first_chunk * ORDER_CHUNK
        return order[offset:offset + share]


def split_targets(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T + 1) tokens -> inputs (B, T) and targets (B, T): the target is the next token."""
    return tokens[:, :-1], tokens[:, 1:]


# --------------------------------------------------------------------------------------------------
# The documents in a new order

def find_documents(shards: Shards, eot: int) -> np.ndarray:
    """Where the documents of a stream start, and its length: (documents + 1,) int64.

    A document starts with `<|endoftext|>`. This reads all shards, a second per billion tokens or
    more, and keeps 8 bytes per document: 80 MB for the ten million of 10B tokens of FineWeb-Edu.
    A `ShuffledDocuments` keeps 16 more.
    """
    starts = []
    for array, end in zip(shards.arrays, shards.ends):
        starts.append(np.flatnonzero(array == eot) + end - len(array))
    # the stream may begin inside a document: 0 is a start, too
    return np.unique(np.concatenate([[0], *starts, [len(shards)]]).astype(np.int64))


class ShuffledDocuments:
    """A stream with its documents in another order, which `name` selects."""

    def __init__(self, shards: Shards, starts: np.ndarray, name: str):
        self.shards = shards
        n = len(starts) - 1
        order = permute(np.arange(n), n, round_keys(name)[:, None])
        # where each document ends in the new stream, and how far from there it ends in the old one
        self.ends = np.cumsum(starts[order + 1] - starts[order])
        self.shifts = starts[order + 1] - self.ends

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 of the new stream."""
        pieces = []
        document = np.searchsorted(self.ends, start, "right")
        while start < stop:
            # read the document, or the part of it that lies between start and stop
            end = min(int(self.ends[document]), stop)
            shift = int(self.shifts[document])
            pieces.append(self.shards.read(start + shift, end + shift))
            start = end
            document += 1
        return np.concatenate(pieces)


# --------------------------------------------------------------------------------------------------
# The shuffled order

@functools.lru_cache(8)
def shuffled_chunk(n: int, seed: int, chunk: int) -> np.ndarray:
    """Entries chunk * ORDER_CHUNK to (chunk + 1) * ORDER_CHUNK - 1 of the endless order.

    The order is one permutation of range(n) after another, one per epoch; in epoch e, e * n is
    added to it. Computing a whole chunk in NumPy takes hardly longer than computing one entry.
    """
    positions = np.arange(chunk * ORDER_CHUNK, (chunk + 1) * ORDER_CHUNK)
    epochs, positions_in_epoch = np.divmod(positions, n)
    # draw keys once per epoch, then repeat them for every position in that epoch
    distinct_epochs, epoch_index = np.unique(epochs, return_inverse=True)
    epoch_keys = [round_keys(f"{seed} {epoch}") for epoch in distinct_epochs]
    keys = np.stack(epoch_keys, axis=1)[:, epoch_index]  # (rounds, ORDER_CHUNK)
    return epochs * n + permute(positions_in_epoch, n, keys)


def permute(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Applies the permutation of range(n) that `keys` select: position -> sequence index.

    positions: (P,) int64 in range(n). keys: (rounds, P), or (rounds, 1) for one permutation.
    No table of n entries is stored, so the cost is the same for any corpus and any step.

    A Feistel network shuffles the numbers of 2h bits. It splits a number into two halves of h bits,
    and each round replaces (left, right) with (right, left XOR f(right)). A round can be undone,
    whatever f is, so the network is a permutation of range(4^h). We take the smallest h with
    4^h >= n. A result that is not below n passes through the network again, until it is. This is
    called cycle walking, and gives a permutation of range(n) (Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains").

    Unlike shuffling within blocks, it can bring any two sequences together. Unlike the cheaper map
    (a * position + b) mod n, it leaves no regular pattern.
    """
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)  # h
    shift = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    keys = np.broadcast_to(keys, (len(keys), len(positions)))

    numbers = positions.astype(np.uint64)
    active = np.ones(len(positions), dtype=bool)  # every number passes through at least once
    while active.any():
        left = numbers[active] >> shift
        right = numbers[active] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key[active]) & mask)
        numbers[active] = left << shift | right
        active = numbers >= n
    return numbers.astype(np.int64)


def round_keys(name: str) -> np.ndarray:
    """Keys for the six rounds of `permute`, (6,) uint64: a hash of the name."""
    return np.frombuffer(hashlib.sha512(name.encode()).digest(), dtype="<u8")[:6]


def mix(x: np.ndarray) -> np.ndarray:
    """The round function f of `permute`: scrambles 64 bits, so that each depends on all bits of x.

    This is splitmix64's finalizer (Steele et al. 2014, "Fast Splittable Pseudorandom Number
    Generators").
    """
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
