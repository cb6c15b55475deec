"""One step of a model for many texts: their caches, attention for each text by itself, and the logits that are wanted.

This is plain torch and runs everywhere; native.py does the same in one call. In either a row's logits do not depend on the
rows beside it, bit for bit.
"""
import concurrent.futures
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.packed import pack_model
from model import GPT

CHUNK = 64  # tokens; a prompt is processed in chunks that begin at multiples of this


class KVCache:
    """Keys and values of one text's tokens, the first `length` of its places filled; it grows by whole chunks.

    The first `reusable` are, bit for bit, what any prompt that begins with these tokens would be given.
    """

    def __init__(self, kv, length: int = 0, reusable: int = 0):
        self.kv, self.length, self.reusable = kv, length, reusable  # kv (n_layer, 2, n_head, places, head size)

    def make_room(self, length: int):
        """Room for `length` tokens: twice what there was, so that a text is copied a few times only."""
        if length > self.kv.size(3):
            places = -(-max(length, 2 * self.length) // CHUNK) * CHUNK
            grown = self.kv.new_zeros(*self.kv.shape[:3], places, self.kv.size(4))  # zeros: places not filled are masked
            grown[..., :self.length, :] = self.kv[..., :self.length, :]
            self.kv = grown

    def copy(self, length: int) -> "KVCache":
        """The first `length` tokens in a cache of their own."""
        places = -(-length // CHUNK) * CHUNK
        return KVCache(self.kv[..., :places, :].clone(), length, min(length, self.reusable))


class Segment(NamedTuple):
    """Tokens that follow those in a text's cache: a part of a chunk of its prompt, or the one that was sampled last."""
    cache: KVCache
    start: int
    ids: list[int]
    sampled: bool = False


class Forward:
    """A model's steps, in the precision `dtype`; `how` says by what they are computed."""

    def __init__(self, model: GPT, dtype: str):
        config, weight = model.config, model.transformer.wte.weight
        exact = dtype == "float32" or weight.device.type != "cpu"
        self.no_cache = torch.zeros(config.n_layer, 2, config.n_head, 0, config.n_embd // config.n_head, device=weight.device,
                                    dtype=getattr(torch, dtype) if exact else torch.float16)
        self.embed, self.pack, self.backend = model.transformer, (model, dtype), "by torch"

    @functools.cached_property
    def model(self) -> GPT:
        # Packed in a thread that ends: OpenMP keeps workers for each thread that computed, and with more of them than cores
        # it waits by sleeping, which costs the scheduler's thread a fifth.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(pack_model, *self.pack).result()

    def new_cache(self) -> KVCache:
        return KVCache(self.no_cache)

    @torch.inference_mode()
    def __call__(self, segments: list[Segment], wanted: Iterable[int]):
        """float32 logits (rows wanted, vocab_size), on the CPU, of all segments' tokens one after another; fills their caches."""
        for cache, start, ids, _ in segments:
            cache.make_room(start + len(ids))
        ids = [i for segment in segments for i in segment.ids]
        positions = [start + i for _, start, ids, _ in segments for i in range(len(ids))]
        logits = self.logits(segments, ids, positions, list(wanted))
        for segment in segments:
            cache = segment.cache
            cache.length = segment.start + len(segment.ids)
            if cache.reusable == segment.start and self.is_reusable(segment):
                cache.reusable = cache.length
        return logits

    def logits(self, segments: list[Segment], ids: list[int], positions: list[int], wanted: list[int]):
        idx, positions = (torch.tensor([row], device=self.no_cache.device) for row in (ids, positions))
        hidden = self.model.hidden(idx, positions, attend=functools.partial(attend, segments))[0]  # (R, n_embd)
        return self.model.logits(hidden[wanted]).float().cpu()

    def is_reusable(self, segment: Segment) -> bool:
        """Attention of a sampled token was computed for one row instead of for a chunk, and added up in another order."""
        return not segment.sampled


def attend(segments: list[Segment], layer: int, q, k, v):
    """(1, nh, R, hs) of q, k and v alike: each row attends to its own text, in its cache, up to itself."""
    y, row = torch.zeros_like(q), 0
    for cache, start, ids, sampled in segments:
        kv, rows, end = cache.kv[layer], slice(row, row + len(ids)), start + len(ids)  # kv (2, nh, places, hs)
        kv[0, :, start:end], kv[1, :, start:end] = k[0, :, rows], v[0, :, rows]
        row = rows.stop
        if sampled:
            y[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], *kv[:, None, :, :end].to(q.dtype))
            continue
        base = start // CHUNK * CHUNK  # a row's place in the product does not depend on where its chunk was cut
        chunk = q.new_zeros(1, q.size(1), CHUNK, q.size(3))
        inside = slice(start - base, end - base)
        chunk[:, :, inside] = q[:, :, rows]
        y[:, :, rows] = F.scaled_dot_product_attention(chunk, *kv[:, None, :, :base + CHUNK].to(q.dtype),
                                                       attn_mask=causal(base, q.device, q.dtype))[:, :, inside]
    return y


@functools.lru_cache(maxsize=64)
def causal(base: int, device, dtype):
    """(CHUNK, base + CHUNK): what is added to the scores of the chunk that begins at `base`."""
    return torch.full((CHUNK, base + CHUNK), -torch.inf, device=device, dtype=dtype).triu_(base + 1)
