"""Turns the tokens of a request into text, piece by piece, up to the first stop string."""
import asyncio
import contextlib
import functools
from typing import NamedTuple

from engine.scheduler import Request, Token
from tokenizer import Tokenizer


class Piece(NamedTuple):
    """The text that one event adds to sample `index`.

    The text is empty while a character or a possible stop string is incomplete. The last piece of a
    sample has a reason ("stop", "length" or "deadline"), and may have text but no token.
    """
    index: int
    text: str
    token: Token | None = None
    reason: str | None = None
    offset: int = 0  # where the token's text begins in the sample's, in characters


class Reader:
    """Decodes a request's events to text, and ends each sample before its first stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.request, self.eot = request, tokenizer.eot
        self.decoders = [tokenizer.stream_decoder() for _ in range(request.n)]
        self.held = [""] * request.n  # text held back, because it may begin a stop string
        self.lengths = [0] * request.n  # characters decoded
        self.ended = set()  # indices of samples

    @property
    def done(self) -> bool:
        return len(self.ended) == self.request.n

    def read(self, event: tuple[int, Token | str]) -> Piece | None:
        """The piece that an event adds, or None if its sample has already ended."""
        index, token = event
        if index in self.ended:
            return None
        decode = self.decoders[index]
        reason = None
        if isinstance(token, str):
            token, reason = None, token
        elif token.id == self.eot:  # it has no text
            reason = "stop"
        new = decode([], final=True) if reason else decode([token.id])
        offset = self.lengths[index]
        self.lengths[index] += len(new)

        # cut the text at the first stop string
        text = self.held[index] + new
        stops = self.request.sampling.stop
        positions = [text.find(stop) for stop in stops if stop in text]
        if positions:
            text, reason = text[:min(positions)], "stop"

        # hold back an ending that may turn out to begin a stop string
        held = 0
        if reason:
            self.ended.add(index)
            self.request.cancel(index)
        else:
            held = max((partial_match(text, stop) for stop in stops), default=0)
        self.held[index] = text[len(text) - held:]
        return Piece(index, text[:len(text) - held], token, reason, offset)


def partial_match(text: str, stop: str) -> int:
    """The length of the longest proper prefix of `stop` that ends the text."""
    return max(length for length in range(len(stop)) if text.endswith(stop[:length]))


class PieceStream:
    """An async iterator over the pieces of one or more requests, on an asyncio event loop.

    Each item is a batch: a list of (reader index, Piece) with everything new. It may be empty: if
    nothing arrives, there is one after `idle_s` seconds, so that the consumer can check other
    things. Iteration ends as soon as all samples have ended, and raises the error of a request that
    failed. The requests are cancelled when the stream is closed, cancelled or garbage-collected.
    """

    def __init__(self, readers: list[Reader], idle_s: float):
        self.readers, self.idle_s = readers, idle_s
        self.arrived = asyncio.Event()
        self.connected = False

    def __aiter__(self) -> "PieceStream":
        return self

    async def __anext__(self) -> list[tuple[int, Piece]]:
        try:
            if not self.connected:
                self.connect()
            await asyncio.sleep(0)  # other tasks run even if there is always something new
            batch = self.take()
            if batch:
                return batch
            if all(reader.done for reader in self.readers):
                raise StopAsyncIteration
            # not wait_for, which in Python 3.11 loses a cancellation if there is something new
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.idle_s):
                    await self.arrived.wait()
            return self.take()
        except BaseException:  # the end, an error of a request, or the consumer is cancelled
            self.close()
            raise

    def connect(self):
        """Makes the requests wake up this event loop when there are new events."""
        loop = asyncio.get_running_loop()
        for reader in self.readers:
            # The callback must not refer to the stream: the scheduler would keep it alive.
            reader.request.wake = functools.partial(wake_loop, loop, self.arrived, reader.request)
        self.connected = True

    def take(self) -> list[tuple[int, Piece]]:
        """Everything that has arrived since the last call."""
        self.arrived.clear()
        batch = []
        for i, reader in enumerate(self.readers):
            pieces = map(reader.read, reader.request.take_events())
            batch += [(i, piece) for piece in pieces if piece]
        return batch

    def close(self):
        for reader in self.readers:
            reader.request.wake = None
            reader.request.cancel()

    __del__ = close


def wake_loop(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event, request: Request):
    try:
        loop.call_soon_threadsafe(arrived.set)
    except RuntimeError:  # the event loop is closed, so nobody reads any more
        request.cancel()
