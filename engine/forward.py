"""One forward step for many sequences at once, in PyTorch. native.py does the same in one C++ call.

A step takes the next tokens of several sequences, each with its own KV cache, and returns the
logits of selected rows. In both versions a row's logits do not depend on the other rows of the
step, bit for bit.
"""
import concurrent.futures
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.cache import CHUNK, KVCache
from engine.packed import pack_model
from model import GPT


class Segment(NamedTuple):
    """Tokens of one sequence to process: part of its prompt, or the token sampled last."""
    cache: KVCache
    start: int  # position of the first of these tokens
    ids: list[int]
    sampled: bool = False


class Forward:
    """Steps of a model in the precision `dtype`. `backend` says what computes them."""

    def __init__(self, model: GPT, dtype: str):
        config = model.config
        device = model.transformer.wte.weight.device
        half_cache = device.type == "cpu" and dtype != "float32"
        self.empty_kv = torch.zeros(
            config.n_layer, 2, config.n_head, 0, config.n_embd // config.n_head, device=device,
            dtype=torch.float16 if half_cache else getattr(torch, dtype))
        self.unpacked = model
        self.dtype = dtype
        self.backend = "by torch"

    @functools.cached_property
    def model(self) -> GPT:
        """The model with its matrices packed, on first use."""
        # Pack in a thread that ends. OpenMP keeps workers for every thread that has computed, and
        # once there are more of them than cores they sleep between tasks: steps get 20% slower.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(pack_model, self.unpacked, self.dtype).result()

    def new_cache(self) -> KVCache:
        return KVCache(self.empty_kv)

    @torch.inference_mode()
    def __call__(self, segments: list[Segment], output_rows: Iterable[int]):
        """Process all tokens of the segments, R rows in order, and store them in the caches.

        Returns the logits of the `output_rows`: float32 (len(output_rows), vocab_size), on the CPU.
        """
        # flatten the segments into rows
        ids, positions = [], []
        for segment in segments:
            stop = segment.start + len(segment.ids)
            segment.cache.reserve(stop)
            ids += segment.ids
            positions += range(segment.start, stop)
        logits = self.logits(segments, ids, positions, list(output_rows))
        # advance the caches
        for segment in segments:
            cache = segment.cache
            cache.length = segment.start + len(segment.ids)
            if cache.reusable == segment.start and self.is_reusable(segment):
                cache.reusable = cache.length
        return logits

    def logits(self, segments: list[Segment], ids: list[int], positions: list[int],
               output_rows: list[int]):
        device = self.empty_kv.device
        idx = torch.tensor([ids], device=device)  # (1, R)
        positions = torch.tensor([positions], device=device)  # (1, R)
        output_rows = torch.tensor(output_rows, device=device)
        attend = functools.partial(attend_to_caches, segments)
        hidden = self.model.hidden(idx, positions, attend=attend)[0]  # (R, C)
        return self.model.logits(hidden[output_rows]).float().cpu()

    def is_reusable(self, segment: Segment) -> bool:
        """Whether the segment's cache entries are those that a prefill of the same tokens gives.

        Attention for one sampled token adds up in another order than attention for a chunk.
        """
        return not segment.sampled


def attend_to_caches(segments: list[Segment], layer: int, q, k, v):
    """Causal attention of each row to its own sequence; q, k, v and the result (1, nh, R, hs)."""
    y = torch.zeros_like(q)
    row = 0
    for segment in segments:
        start, stop = segment.start, segment.start + len(segment.ids)
        rows = slice(row, row + len(segment.ids))
        row = rows.stop
        # store the new keys and values
        kv = segment.cache.kv[layer]  # (2, nh, capacity, hs)
        kv[0, :, start:stop] = k[0, :, rows]
        kv[1, :, start:stop] = v[0, :, rows]
        if segment.sampled:
            keys, values = kv[:, None, :, :stop].to(q.dtype)  # (1, nh, stop, hs) each
            y[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], keys, values)
            continue
        # compute the whole chunk, with zeros for the other queries, so that a row's result
        # does not depend on where the scheduler cut its chunk
        base = start // CHUNK * CHUNK
        inside = slice(start - base, stop - base)
        chunk = q.new_zeros(1, q.size(1), CHUNK, q.size(3))
        chunk[:, :, inside] = q[:, :, rows]
        keys, values = kv[:, None, :, :base + CHUNK].to(q.dtype)  # (1, nh, base + CHUNK, hs) each
        mask = causal_mask(base, q.device, q.dtype)
        chunk = F.scaled_dot_product_attention(chunk, keys, values, attn_mask=mask)
        y[:, :, rows] = chunk[:, :, inside]
    return y


@functools.lru_cache(maxsize=64)
def causal_mask(base: int, device, dtype):
    """The mask (CHUNK, base + CHUNK), 0 or -inf, of the chunk that starts at position `base`."""
    mask = torch.full((CHUNK, base + CHUNK), -torch.inf, device=device, dtype=dtype)
    return mask.triu_(base + 1)
