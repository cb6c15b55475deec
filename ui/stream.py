"""Streams texts to the page, for all tabs that write."""
import asyncio
import dataclasses
from collections.abc import AsyncIterator
from time import perf_counter

import gradio as gr

from engine.reader import Piece, PieceStream, Reader
from engine.sampling import Sampling
from generate import Engine

REFRESH_S = 0.05  # the page is updated at most this often,
CROWD = 8  # and less often if more than this many texts are being generated


def visitor() -> str | None:
    """The address of the visitor whose event is being handled.

    The engine shares its places fairly among its clients, so each visitor must count as one.
    """
    request = gr.context.LocalContext.request.get(None)
    return request and request.client.host


class Writing:
    """One or more continuations of a prompt while they are generated.

    `prompt` is what `Engine.encode` returns: ids and notices. `texts`, `tokens` (counts),
    `logprobs` (sums, nats) and `reasons` (None until the text has ended) have an entry for each
    version.
    """

    def __init__(self, engine: Engine, prompt: tuple[list[int], list[str]], sampling: Sampling,
                 versions: int = 1):
        self.started_at = perf_counter()
        self.engine, self.sampling = engine, sampling
        self.ids, self.notices = prompt
        self.texts = [""] * versions
        self.tokens = [0] * versions
        self.logprobs = [0.0] * versions
        self.reasons = [None] * versions
        self.request = None

    def submit(self) -> Reader:
        """Sends the request to the engine. Raises Busy."""
        self.request = self.engine.submit(self.ids, len(self.texts), client=visitor(),
                                          **dataclasses.asdict(self.sampling))
        return Reader(self.engine.tokenizer, self.request)

    def add(self, piece: Piece):
        self.texts[piece.index] += piece.text
        self.reasons[piece.index] = piece.reason
        if piece.token:
            self.tokens[piece.index] += 1
            self.logprobs[piece.index] += piece.token.logprob or 0

    @property
    def done(self) -> bool:
        return all(self.reasons)

    def context(self) -> dict[str, int]:
        """How many tokens of its context the model uses for the first version: "used" of "size"."""
        size = self.engine.block_size
        used = len(self.ids) + self.tokens[0]
        if used > size:
            # at size + 1 tokens the engine keeps half of the context, which then fills up again
            half = max(1, size // 2)
            used = half + (used - size - 1) % (size + 1 - half)
        return {"used": used, "size": size}

    def figures(self) -> str:
        """Length and speed so far, or what the request is waiting for."""
        request, tokens = self.request, sum(self.tokens)
        position = request.queue_position()
        if position:
            running, _ = request.scheduler.load()
            return f"Number {position} in the queue: {running} texts are being written."
        if not tokens and not self.done:
            return "Reading the prompt …"

        first_s = request.first_event_at - self.started_at
        writing_s = request.last_event_at - request.first_event_at
        after_first = tokens - len(self.texts)
        parts = [f"{tokens:,} token{'s' * (tokens != 1)}", f"first after {first_s * 1000:,.0f} ms"]
        if after_first > 0 and writing_s > 0:
            parts.append(f"{after_first / writing_s:,.0f} tokens/s")
        parts += ["context {used:,} of {size:,}".format(**self.context()), f"seed {request.seed}"]
        if "deadline" in self.reasons:
            parts.append("stopped at the time limit")
        return "  ".join([" · ".join(parts), *self.notices])


async def follow(*writings: Writing) -> AsyncIterator[None]:
    """Starts the writings, and yields whenever there is something new to show.

    Ends when all have ended; cancels them if the consumer leaves. Raises the engine's errors, such
    as Busy.
    """
    try:
        readers = [writing.submit() for writing in writings]
        async for batch in PieceStream(readers, REFRESH_S):
            for i, piece in batch:
                writings[i].add(piece)
            yield
            if not all(writing.done for writing in writings):
                # give a crowd fewer updates, so that the computation keeps its cores
                running = max(writing.request.scheduler.load()[0] for writing in writings)
                await asyncio.sleep(REFRESH_S * max(1, running / CROWD))
    finally:
        for writing in writings:
            if writing.request:
                writing.request.cancel()
