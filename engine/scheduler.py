"""Many texts, one model: a thread steps all of them together, each with its own place, settings, random stream and end.

A step is one pass over the weights. Each text that is being written brings the row of its last token, new prompts bring theirs
a chunk at a time, so that nobody's text waits for more than a chunk of somebody else's; between steps texts come and go. What a
text becomes depends on its own prompt, settings and seed alone: rows of a step do not depend on each other (forward.py), and
each text has a random stream of its own.
"""
import atexit
import bisect
import collections
import itertools
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from common.seed import seed_of
from engine.forward import CHUNK, Forward, KVCache, Segment
from engine.sampling import Sampling, penalize, sample, top_ids

IDLE_PROMPT_TOKENS = 8 * CHUNK  # tokens of prompts in a step when nobody is writing
LINGER_S = 2  # how long the thread stays when there is nothing to do


class Busy(UserError):
    """There are more texts to write than there is room or time for."""


class Token(NamedTuple):
    """A sampled token; its log-probability (nats) under the model, and the likeliest (id, log-probability)s, where asked for."""
    id: int
    logprob: float | None = None
    top: tuple = ()


class PrefixStore:
    """Caches of texts that are written, the latest last, of at most `max_bytes` in all: what begins alike starts from there."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.entries = max_bytes, []  # (ids, KVCache)

    def add(self, ids: list[int], cache: KVCache):
        if not cache.reusable or any(entry[:cache.reusable] == ids[:cache.reusable] for entry, _ in self.entries):
            return
        ids, cache = ids[:cache.reusable], cache.copy(cache.reusable)
        self.entries = [entry for entry in self.entries if ids[:len(entry[0])] != entry[0]] + [(ids, cache)]
        while self.entries and sum(cache.kv.nbytes for _, cache in self.entries) > self.max_bytes:
            self.entries.pop(0)

    def find(self, ids: list[int]) -> KVCache | None:
        """A cache of the longest beginning of ids that there is, short of all of them: the last one's logits are needed."""
        best, length = None, 0
        for i, (entry, _) in enumerate(self.entries):
            shared = common_prefix(entry, ids[:-1])
            if shared > length:
                best, length = i, shared
        if best is None:
            return None
        self.entries.append(self.entries.pop(best))
        return self.entries[-1][1].copy(length)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return bisect.bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


# ----------------------------------------------------------------------------------------------------------------
# Texts and their scheduler

class Text:
    """One continuation while it is written: its window of tokens, cache, settings, random stream and reader."""

    def __init__(self, request: "Request", index: int):
        self.request, self.index, self.window = request, index, list(request.ids)
        self.seen = set(request.ids)
        self.random = np.random.default_rng(seed_of(request.seed, index))
        self.cache, self.prompting, self.made = None, True, 0  # prompting: the window is not in the cache yet

    def choose(self, logits) -> Token:
        """The next token by logits (V,)."""
        options, plain, most = self.request.sampling, logits, logits.max()
        if not np.isfinite(most):
            raise UserError("The model's predictions are not numbers: its weights are damaged, or its training diverged.")
        if options.repetition_penalty != 1:
            logits = penalize(logits, self.seen, options.repetition_penalty)
        token = Token(sample(logits, self.random.random(), options.temperature, options.top_k, options.top_p))
        if options.logprobs is not None:
            total = most + np.log(np.exp(plain - most).sum(dtype=np.float64))
            top = top_ids(plain, min(options.logprobs, len(plain)))
            token = Token(token.id, float(plain[token.id] - total), tuple((int(i), float(plain[i] - total)) for i in top))
        self.seen.add(token.id)
        self.made += 1
        return token


class Request:
    """n texts from one prompt, and the reader's side of them: iterating gives (index, Token), or (index, why it ended: "stop" at
    `<|endoftext|>`, "length", "deadline"), as they come, until all have ended."""

    def __init__(self, scheduler: "Scheduler", ids: list[int], n: int, sampling: Sampling):
        self.scheduler, self.ids, self.n, self.sampling = scheduler, ids[-scheduler.block_size:], n, sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.events, self.left = queue.SimpleQueue(), set(range(n))  # left: those that still have a reader
        self.wake = None  # a function that is called when there is an event
        self.deadline = time.monotonic() + scheduler.deadline_s

    def __iter__(self) -> Iterator[tuple[int, Token | str]]:
        try:
            while self.left:
                event = self.events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event[1], str):
                    self.left.discard(event[0])
                yield event
        finally:
            self.cancel()

    def put(self, event: tuple[int, Token | str] | Exception):
        self.events.put(event)
        if self.wake:
            self.wake()

    def cancel(self, index: int | None = None):
        """Nobody reads text `index`, or any, on: it leaves before the next step."""
        self.left -= self.left if index is None else {index}

    def place(self) -> int:
        """Its place in the queue, from 1; 0 where it is being written or done."""
        with self.scheduler.lock:
            return self.scheduler.waiting.index(self) + 1 if self in self.scheduler.waiting else 0


class Scheduler:
    """Steps all running texts of a model together, in a thread that lives while there are any.

    At most `max_running` texts run and `max_waiting` requests wait, in the order in which they came; past that, or when its
    `deadline_s` passes before its turn, a request gets `Busy`, and a running text ends.
    """

    def __init__(self, forward: Forward, vocab_size: int, eot: int | None, block_size: int, max_running: int = 32,
                 max_waiting: int = 64, deadline_s: float = 600, prefix_bytes: int = 2**28):
        self.forward, self.vocab_size, self.eot, self.block_size = forward, vocab_size, eot, block_size
        self.max_running, self.max_waiting, self.deadline_s = max_running, max_waiting, deadline_s
        self.prefixes = PrefixStore(prefix_bytes)
        self.waiting, self.running, self.turn = collections.deque(), [], 0
        self.lock, self.thread, self.closed = threading.Condition(), None, False

    def submit(self, ids: list[int], n: int = 1, sampling: Sampling | None = None) -> Request:
        """Asks for n texts that go on from ids. Raises UserError for what cannot be, and Busy."""
        if not ids:
            raise UserError("There is no token to continue: give at least one.")
        if not 1 <= n <= self.max_running:
            raise UserError(f"The number of samples is at least 1 and at most {self.max_running}, not {n}.")
        request = Request(self, ids, n, sampling or Sampling())
        if request.sampling.max_new_tokens == 0:
            for i in range(n):
                request.put((i, "length"))
            return request
        with self.lock:
            place = len(self.waiting) + 1 - (self.max_running - len(self.running))  # of those that will not be let in at once
            if place > self.max_waiting:
                raise Busy(f"Busy: {len(self.running)} texts are being written, and this would be number {place} in the queue, "
                           f"which takes {self.max_waiting}; try again in a while.")
            self.waiting.append(request)
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, daemon=True, name="scheduler")
                self.thread.start()
                atexit.register(self.close)
            self.lock.notify()
        return request

    def close(self):
        """Ends the thread, and with it whatever it was writing; Python cannot end while it computes."""
        with self.lock:
            self.closed, thread = True, self.thread
            self.lock.notify()
        if thread:
            thread.join()

    def run(self):
        """Steps until nobody has wanted anything for a while."""
        while not self.closed:
            try:
                self.admit_and_remove()
                if self.running:
                    self.step()
                    continue
            except Exception as error:  # whatever it is, the readers are told, and the next request finds a scheduler
                for request in {text.request for text in self.running}:
                    request.put(error)
                self.running = []
            with self.lock:
                if not self.lock.wait_for(lambda: self.waiting or self.closed, timeout=LINGER_S):
                    self.thread = None
                    atexit.unregister(self.close)
                    return

    def admit_and_remove(self):
        """Lets the texts go that nobody reads or whose time is over, and as many requests in as there is room for."""
        now = time.monotonic()
        for text in list(self.running):
            if text.index not in text.request.left:
                self.end(text, None)
            elif now > text.request.deadline:
                self.end(text, "deadline")
        with self.lock:
            for place, request in enumerate(list(self.waiting), 1):
                if not request.left:
                    self.waiting.remove(request)
                elif now > request.deadline:
                    self.waiting.remove(request)
                    request.put(Busy(f"Busy: after {self.deadline_s:g} s this was still number {place} in the queue; try "
                                            "again in a while."))
            while self.waiting and len(self.running) + self.reserved() + self.waiting[0].n <= self.max_running:
                self.running.append(Text(self.waiting.popleft(), 0))

    def reserved(self) -> int:
        """Places of texts that begin when their request's prompt is in the cache."""
        return sum(text.request.n - 1 for text in self.running if text.index == 0 and not text.made)

    @torch.inference_mode()
    def step(self):
        """One token for each text that is being written, and a part of the prompts of those that are to be."""
        segments, ready = [], []
        prompting = [text for text in self.running if text.prompting]
        for text in self.running:
            if not text.prompting:
                segments.append(Segment(text.cache, text.cache.length, text.window[-1:], sampled=True))
                ready.append((text, len(segments)))
        budget, self.turn = CHUNK if segments else IDLE_PROMPT_TOKENS, self.turn + 1
        for i in range(len(prompting)):  # each step begins with the next one
            text = prompting[(self.turn + i) % len(prompting)]
            if text.cache is None:
                text.cache = self.prefixes.find(text.window) or self.forward.new_cache()
            start = text.cache.length
            while budget > 0 and start < len(text.window):
                ids = text.window[start:min((start // CHUNK + 1) * CHUNK, start + budget)]
                segments.append(Segment(text.cache, start, ids))
                start, budget = start + len(ids), budget - len(ids)
            if start == len(text.window):
                ready.append((text, len(segments)))
        ends = list(itertools.accumulate(len(segment.ids) for segment in segments))
        logits = self.forward(segments, [ends[count - 1] - 1 for _, count in ready])[:, :self.vocab_size]  # no padding ids
        chosen = [(each, each.choose(row)) for (text, _), row in zip(ready, logits.numpy()) for each in self.begin(text)]
        for text, token in chosen:  # readers wake up now, and have the next step's time
            self.write(text, token)

    def begin(self, text: Text) -> list[Text]:
        """The texts that go on from here: this one, and where its prompt has just been processed, its request's others too."""
        texts = [text]
        if text.prompting and not text.made:
            self.prefixes.add(text.window, text.cache)
            texts += [Text(text.request, i) for i in range(1, text.request.n)]
            for other in texts[1:]:
                other.cache = text.cache.copy(text.cache.length)
            self.running += texts[1:]
        for each in texts:
            each.prompting = False
        return texts

    def write(self, text: Text, token: Token):
        """Adds a token to a text, and ends it where it ends."""
        if token.id == self.eot:
            return self.end(text, "stop")
        text.request.put((text.index, token))
        if text.made == text.request.sampling.max_new_tokens:
            return self.end(text, "length")
        text.window.append(token.id)
        if len(text.window) > self.block_size:  # the last half of the context, processed again
            text.window = text.window[-max(1, self.block_size // 2):]
            text.cache, text.prompting = None, True

    def end(self, text: Text, reason: str | None):
        self.running.remove(text)
        if text.cache is not None:
            self.prefixes.add(text.window, text.cache)
        if reason:
            text.request.put((text.index, reason))
