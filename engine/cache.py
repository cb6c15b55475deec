"""KV caches: what attention needs of a sequence's tokens, and those kept for prompts to come."""
import bisect

CHUNK = 64  # tokens; prompts are prefilled in chunks that start at multiples of this


class KVCache:
    """Keys and values of one sequence's first `length` tokens. The cache grows by whole chunks.

    The entries of the first `reusable` tokens are bit for bit those that a prefill of the same
    tokens gives, so any prompt that starts with these tokens can use a copy.
    """

    def __init__(self, kv, length: int = 0, reusable: int = 0):
        self.kv = kv  # (n_layer, 2, n_head, capacity, head size)
        self.length = length
        self.reusable = reusable

    def reserve(self, length: int):
        """Makes room for `length` tokens. Doubles the capacity, so that copies stay rare."""
        if length > self.kv.size(3):
            capacity = round_up(max(length, 2 * self.length))
            # zeros, because attention reads whole chunks and masks the entries not filled yet
            grown = self.kv.new_zeros(*self.kv.shape[:3], capacity, self.kv.size(4))
            grown[..., :self.length, :] = self.kv[..., :self.length, :]
            self.kv = grown

    def copy(self, length: int) -> "KVCache":
        """A copy of the first `length` tokens."""
        kv = self.kv[..., :round_up(length), :].clone()
        return KVCache(kv, length, min(length, self.reusable))


def round_up(length: int) -> int:
    """The smallest multiple of CHUNK that holds `length` tokens."""
    return -(-length // CHUNK) * CHUNK


class PrefixCache:
    """Keeps the KV caches of recent texts, so that prompts with a shared prefix can reuse them.

    The caches take at most `max_bytes` in total; the least recently used one is dropped first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries: list[tuple[list[int], KVCache]] = []  # least recently used first

    def add(self, ids: list[int], cache: KVCache):
        ids = ids[:cache.reusable]
        if not ids or any(kept_ids[:len(ids)] == ids for kept_ids, _ in self.entries):
            return
        # replace the entries that are a prefix of the new one
        self.entries = [entry for entry in self.entries if ids[:len(entry[0])] != entry[0]]
        self.entries.append((ids, cache.copy(len(ids))))
        while self.entries and sum(cache.kv.nbytes for _, cache in self.entries) > self.max_bytes:
            self.entries.pop(0)

    def find(self, ids: list[int]) -> KVCache | None:
        """A copy of the cache for the longest known prefix of `ids`.

        It never covers all of `ids`, because the last token must run to produce logits.
        """
        lengths = [common_prefix(kept_ids, ids[:-1]) for kept_ids, _ in self.entries]
        length = max(lengths, default=0)
        if length == 0:
            return None
        entry = self.entries.pop(lengths.index(length))
        self.entries.append(entry)
        _, cache = entry
        return cache.copy(length)


def common_prefix(a: list[int], b: list[int]) -> int:
    """The number of leading ids that two lists share."""
    # Binary search: comparing slices is much faster than comparing ids in a Python loop.
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: a[:n] != b[:n])
