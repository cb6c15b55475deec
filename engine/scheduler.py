"""Generates many sequences at once: one thread runs the model for all of them together.

Each step is one pass over the weights. A sequence that is decoding contributes one row, its last
token; prompts are prefilled a chunk at a time, so that a long prompt delays the other sequences by
one chunk at most. Sequences join and leave between steps (continuous batching).

A sequence depends only on its own prompt, settings and seed: the rows of a step do not depend on
each other (see forward.py), and each sequence has its own random stream.

Clients share the places fairly: a free one goes to the client that has the fewest, and some stay
free for clients that have none.
"""
import atexit
import collections
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from common.seed import derive_seed
from engine.cache import CHUNK, KVCache, PrefixCache
from engine.forward import Forward, Segment
from engine.sampling import Sampling, penalize, sample, top_ids

IDLE_PREFILL_TOKENS = 8 * CHUNK  # prompt tokens in a step in which no sequence is decoding
IDLE_S = 2  # the thread ends after this many seconds without work
THREADS = weakref.WeakSet()  # the threads of all schedulers, some of which may be ending
SHARE = 3  # places that a client can take for each one that stays free: 24 of 32


class Busy(UserError):
    """The queue is full, or a request waited in it for too long."""


class Token(NamedTuple):
    """A sampled token. With `logprobs`, also its log-probability and the likeliest alternatives."""
    id: int
    logprob: float | None = None  # nats, under the model's unmodified distribution
    top: tuple = ()  # (id, logprob) pairs, likeliest first


# --------------------------------------------------------------------------------------------------
# Sequences and requests

class Sequence:
    """One sample of a request while it is generated."""

    def __init__(self, request: "Request", index: int):
        self.request, self.index = request, index
        self.window = list(request.ids)  # the tokens that the model sees
        self.seen = set(request.ids)  # for the repetition penalty
        self.random = np.random.default_rng(derive_seed(request.seed, index))
        self.cache: KVCache | None = None
        self.prefilling = True  # the window is not in the cache yet
        self.generated = 0  # tokens

    def next_token(self, logits) -> Token:
        """Samples the next token from logits (V,)."""
        settings = self.request.sampling
        largest = logits.max()
        if not np.isfinite(largest):
            raise UserError("The model's predictions are not numbers: "
                            "its weights are damaged, or its training diverged.")
        penalized = logits
        if settings.repetition_penalty != 1:
            penalized = penalize(logits, self.seen, settings.repetition_penalty)
        token_id = sample(penalized, self.random.random(),
                          settings.temperature, settings.top_k, settings.top_p)
        self.seen.add(token_id)
        self.generated += 1
        if settings.logprobs is None:
            return Token(token_id)

        # log-probabilities without penalty and temperature
        log_total = largest + np.log(np.exp(logits - largest).sum(dtype=np.float64))
        ids = top_ids(logits, min(settings.logprobs, len(logits)))
        top = tuple((int(i), float(logits[i] - log_total)) for i in ids)
        return Token(token_id, float(logits[token_id] - log_total), top)


class Request:
    """`n` samples of one prompt, as their reader sees them.

    Iterating waits for events and yields them as they arrive, until all samples have ended. An
    event is (sample index, Token), or (sample index, finish reason) at the end of a sample: "stop"
    at `<|endoftext|>`, "length", or "deadline". The token `<|endoftext|>` comes only with logprobs.
    """

    def __init__(self, scheduler: "Scheduler", ids: list[int], n: int, sampling: Sampling,
                 client: str | None = None):
        self.scheduler, self.n, self.sampling = scheduler, n, sampling
        self.client = client or id(self)  # without a client, the request counts as one
        self.ids = ids[-scheduler.block_size:]
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.deadline = time.monotonic() + scheduler.deadline_s
        self.active = set(range(n))  # indices of samples that are neither ended nor cancelled
        self.started = 0  # samples
        self.prefilled: tuple[KVCache, np.ndarray] | None = None  # with the prompt's logits (V,)
        self.events = queue.SimpleQueue()
        self.wake = None  # called after each new event, in the scheduler's thread
        self.first_event_at = self.last_event_at = None  # time.perf_counter()

    def __iter__(self) -> Iterator[tuple[int, Token | str]]:
        try:
            while self.active:
                event = self.events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event[1], str):
                    self.active.discard(event[0])
                yield event
        finally:
            self.cancel()

    def take_events(self) -> list[tuple[int, Token | str]]:
        """All events that have arrived, without waiting. Raises the error if the request failed."""
        events = []
        while not self.events.empty():
            event = self.events.get()
            if isinstance(event, Exception):
                if not events:
                    raise event
                self.events.put(event)  # deliver the events before the error first
                break
            events.append(event)
        return events

    def put(self, event: tuple[int, Token | str] | Exception):
        self.last_event_at = time.perf_counter()
        self.first_event_at = self.first_event_at or self.last_event_at
        self.events.put(event)
        wake = self.wake  # the reader may reset it at any time
        if wake:
            wake()

    def cancel(self, index: int | None = None):
        """Stops sample `index`, or all samples, before the next step."""
        if index is None:
            self.active.clear()
        else:
            self.active.discard(index)

    def queue_position(self) -> int:
        """The position in the queue, from 1; 0 once a sample has started."""
        with self.scheduler.lock:
            waiting = self.scheduler.queued()
            return waiting.index(self) + 1 if self in waiting else 0


# --------------------------------------------------------------------------------------------------
# The scheduler

class Scheduler:
    """Generates the sequences of all requests to one model, in a thread that ends when idle.

    At most `max_running` sequences run at once; up to `max_waiting` more requests wait, and a
    client's can fill half of that queue. A request gets `Busy` if the queue is full, or if it still
    waits after `deadline_s` seconds; a sequence that is still running by then ends with the reason
    "deadline".
    """

    def __init__(self, forward: Forward, vocab_size: int, eot: int | None, block_size: int,
                 max_running: int = 32, max_waiting: int = 256, deadline_s: float = 600,
                 prefix_bytes: int = 2**28):
        self.forward, self.block_size = forward, block_size
        self.vocab_size, self.eot = vocab_size, eot
        self.max_running, self.max_waiting = max_running, max_waiting
        self.deadline_s = deadline_s
        self.prefixes = PrefixCache(prefix_bytes)
        self.turn = 0  # which prompt is prefilled first in a step
        # `lock` guards the next four; only the thread changes `running`
        self.lock = threading.Condition()
        self.waiting: list[Request] = []  # those with samples to start
        self.running: list[Sequence] = []
        self.thread: threading.Thread | None = None
        self.closed = False

    def submit(self, ids: list[int], n: int = 1, sampling: Sampling | None = None,
               client: str | None = None) -> Request:
        """Requests n continuations of a prompt. Raises UserError for bad arguments, and Busy.

        The requests of one `client` share its places; without one, a request counts as a client and
        can have all places.
        """
        if not ids:
            raise UserError("The prompt has no tokens: give at least one.")
        if not 1 <= n <= self.max_running:
            raise UserError(f"The number of samples must be from 1 to {self.max_running}, not {n}.")
        request = Request(self, ids, n, sampling or Sampling(), client)
        if request.sampling.max_new_tokens == 0:
            for i in range(n):
                request.put((i, "length"))
            return request
        with self.lock:
            self.check_queue(request)
            self.waiting.append(request)
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, daemon=True, name="scheduler")
                self.thread.start()
                THREADS.add(self.thread)
                atexit.register(self.close)
            self.lock.notify()
        return request

    def check_queue(self, request: Request):
        """Raises Busy if the queue, or the client's half of it, is full."""
        clients = [waiting.client for waiting in self.queued()]
        limits = [(len(clients), self.max_waiting),
                  (clients.count(request.client), max(1, self.max_waiting // 2))]
        # requests that can start at once do not count as queued
        free = self.max_running - len(self.running)
        for others, size in limits:
            position = others + 1 - free
            if position > size:
                raise Busy(f"Busy: {len(self.running)} texts are being generated, and this request "
                           f"would be number {position} in the queue, which holds {size}; "
                           "try again later.")

    def queued(self) -> list[Request]:
        """The requests of which no sample has started, in order of arrival."""
        return [request for request in self.waiting if not request.started]

    def load(self) -> tuple[int, int]:
        """(the number of running sequences, the number of waiting requests)."""
        with self.lock:
            return len(self.running), len(self.queued())

    def close(self):
        """Ends the thread and what it generates; Python cannot exit while the thread computes."""
        with self.lock:
            self.closed = True
            thread = self.thread
            self.lock.notify()
        if thread:
            thread.join()

    def run(self):
        """The thread: runs steps until there has been no work for IDLE_S seconds."""
        while not self.closed:
            try:
                self.remove_and_admit()
                if self.running:
                    self.step()
                    continue
            except Exception as error:  # report it to all readers, and keep serving new requests
                failed = {sequence.request for sequence in self.running}
                with self.lock:
                    self.running.clear()
                    self.waiting = [request for request in self.waiting if request not in failed]
                for request in failed:
                    request.put(error)
            with self.lock:
                if not self.lock.wait_for(lambda: self.waiting or self.closed, timeout=IDLE_S):
                    self.thread = None
                    atexit.unregister(self.close)
                    return

    def remove_and_admit(self):
        """Removes cancelled and overdue sequences, then admits others while there is room."""
        now = time.monotonic()
        # remove running sequences, but not one whose prompt the request's other samples wait for
        for sequence in list(self.running):
            request = sequence.request
            needed = request.active and not sequence.generated
            if sequence.index not in request.active and not needed:
                self.end(sequence, None)
            elif now > request.deadline:
                self.end(sequence, "deadline")
        with self.lock:
            # remove waiting requests
            for position, request in enumerate(list(self.waiting), 1):
                if request.active and now <= request.deadline:
                    continue
                self.waiting.remove(request)
                if request.active and not request.started:
                    request.put(Busy(f"Busy: after {self.deadline_s:g} s this request was still "
                                     f"number {position} in the queue; try again later."))
                elif request.active:
                    for i in range(request.started, request.n):
                        request.put((i, "deadline"))
            # admit samples, one by one
            while request := self.next_request():
                self.start_sample(request)

    def next_request(self) -> Request | None:
        """The request that starts the next sample: that of the client with the fewest places."""
        free = self.max_running - len(self.running)
        if not free or not self.waiting:
            return None
        places = collections.Counter(sequence.request.client for sequence in self.running)

        def can_start(request: Request) -> bool:
            anonymous = request.client == id(request)
            # the other samples start from the prompt that the first one has prefilled
            prepared = not request.started or request.prefilled
            return prepared and (anonymous or places[request.client] < SHARE * free)

        ready = filter(can_start, self.waiting)
        return min(ready, key=lambda request: places[request.client], default=None)

    def start_sample(self, request: Request):
        sequence = Sequence(request, request.started)
        self.running.append(sequence)
        request.started += 1
        prefilled = request.prefilled
        if request.started == request.n:
            self.waiting.remove(request)
            request.prefilled = None
        if prefilled:
            cache, logits = prefilled
            sequence.cache = cache.copy(cache.length)
            sequence.prefilling = False
            self.append_token(sequence, sequence.next_token(logits))

    @torch.inference_mode()
    def step(self):
        """Runs the model once, and gives each sequence that is ready its next token."""
        segments, ready = self.plan_step()
        rows = [row for _, row in ready]
        logits = self.forward(segments, rows)[:, :self.vocab_size]  # (rows, V), no padding ids
        sampled = []
        for (sequence, _), row_logits in zip(ready, logits.numpy()):
            if sequence.prefilling:
                self.end_prefill(sequence, row_logits)
            sampled.append((sequence, sequence.next_token(row_logits)))
        # deliver all tokens at the end: readers can process them during the next step
        for sequence, token in sampled:
            self.append_token(sequence, token)

    def plan_step(self) -> tuple[list[Segment], list[tuple[Sequence, int]]]:
        """The segments of the next step, and the sequences that get a token from it.

        With each sequence comes its row in the step: the row of its last token.
        """
        segments, ready = [], []

        # decode: the last token of each sequence
        for sequence in self.running:
            if not sequence.prefilling:
                ready.append((sequence, len(segments)))
                segments.append(Segment(sequence.cache, sequence.cache.length,
                                        sequence.window[-1:], sampled=True))

        # prefill: split the budget between the prompts, starting with another one in each step
        prefilling = [sequence for sequence in self.running if sequence.prefilling]
        budget = CHUNK if segments else IDLE_PREFILL_TOKENS
        rows = len(segments)  # each has one so far
        self.turn += 1
        for i in range(len(prefilling)):
            sequence = prefilling[(self.turn + i) % len(prefilling)]
            if sequence.cache is None:
                cache = self.prefixes.find(sequence.window)
                sequence.cache = cache or self.forward.new_cache()
            start = sequence.cache.length
            while budget > 0 and start < len(sequence.window):
                chunk_end = (start // CHUNK + 1) * CHUNK
                ids = sequence.window[start:min(chunk_end, start + budget)]
                segments.append(Segment(sequence.cache, start, ids))
                start += len(ids)
                rows += len(ids)
                budget -= len(ids)
            if start == len(sequence.window):
                ready.append((sequence, rows - 1))
        return segments, ready

    def end_prefill(self, sequence: Sequence, logits: np.ndarray):
        """Keeps a prompt's cache for later prompts.

        The request's other samples start from a copy of it and from the prompt's logits (V,).
        """
        sequence.prefilling = False
        if sequence.generated:  # not the prompt, but the last half of a full context
            return
        self.prefixes.add(sequence.window, sequence.cache)
        if sequence.request.n > 1:
            cache = sequence.cache.copy(sequence.cache.length)
            sequence.request.prefilled = cache, logits.copy()

    def append_token(self, sequence: Sequence, token: Token):
        """Adds a token to a sequence and delivers it; ends the sequence if it is complete."""
        request = sequence.request
        if token.id != self.eot or token.logprob is not None:
            request.put((sequence.index, token))
        if token.id == self.eot:
            return self.end(sequence, "stop")
        if sequence.generated == request.sampling.max_new_tokens:
            return self.end(sequence, "length")
        sequence.window.append(token.id)
        if len(sequence.window) > self.block_size:  # keep the last half and prefill it again
            sequence.window = sequence.window[-max(1, self.block_size // 2):]
            sequence.cache, sequence.prefilling = None, True

    def end(self, sequence: Sequence, reason: str | None):
        """Removes a sequence and keeps its cache for reuse; the reader gets the reason, if any."""
        with self.lock:
            self.running.remove(sequence)
        if sequence.cache is not None:
            self.prefixes.add(sequence.window, sequence.cache)
        if reason:
            sequence.request.put((sequence.index, reason))


@atexit.register
def join_threads():
    """Waits at exit, after every close(), for threads that were ending anyway.

    Such a thread may still free a model's tensors, and Python aborts if it exits meanwhile.
    """
    for thread in list(THREADS):
        thread.join()
