"""Requests in progress: text completions and chat completions, whole or as a stream of events."""
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import NamedTuple

from fastapi.concurrency import run_in_threadpool

from api import metrics
from api.conversation import SPEAKERS, fit_prompt, turn_ends
from api.schema import (
    MAX_NEW_TOKENS,
    MAX_TEXTS,
    ChatRequest,
    CompletionRequest,
    ContextExceeded,
    RequestError,
    error_body,
)
from common.errors import UserError
from generate import Engine, Piece, PieceStream, Reader

DISCONNECT_CHECK_S = 0.5  # how often to check that the client is still connected


class TokenInfo(NamedTuple):
    """A token for the `logprobs` of a response."""
    text: str
    offset: int  # where it begins in the choice's text, in characters
    logprob: float | None  # nats; None for the first token of a prompt
    top: list[tuple[str, float]] | None


class Completion:
    """A text completion in progress: `n` choices for each prompt. Raises UserError, and Busy.

    Choice i belongs to prompt i // n. The request ends when the object is garbage-collected, for
    example because the client has disconnected. `client` identifies whom the scheduler serves.
    """
    id_prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, body: CompletionRequest | ChatRequest,
                 client: str | None = None):
        self.engine, self.body, self.n = engine, body, body.n
        self.started_at = time.perf_counter()
        self.completion_tokens = 0
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": body.model,
        }
        self.options = body.sampling()
        self.prompts = self.read_prompts()  # token ids

        # bound what one request can ask for
        self.count = len(self.prompts) * self.n
        tokens = self.count * self.options["max_new_tokens"]
        if self.count > MAX_TEXTS or tokens > MAX_NEW_TOKENS:
            raise RequestError(
                f"A request can generate at most {MAX_TEXTS} texts and {MAX_NEW_TOKENS:,} tokens, "
                f"but this one asks for {self.count:,} texts and {tokens:,} tokens.")

        # submit the prompts; if one fails, cancel the others
        requests = []
        try:
            for ids in self.prompts:
                requests.append(engine.submit(ids, self.n, client, self.head["id"], **self.options))
        except UserError:
            for request in requests:
                request.cancel()
            raise
        readers = [Reader(engine.tokenizer, request) for request in requests]
        self.stream = PieceStream(readers, DISCONNECT_CHECK_S)
        metrics.PROMPT_TOKENS.labels(body.model).inc(sum(map(len, self.prompts)))

    # ----------------------------------------------------------------------------------------------
    # What differs from chat completions

    def read_prompts(self) -> list[list[int]]:
        """The prompts' token ids. Adds the options that only text completions have."""
        self.options["max_new_tokens"] = (
            16 if self.body.max_tokens is None else self.body.max_tokens)
        self.options["logprobs"] = self.body.logprobs
        return [self.fit(self.encode(prompt)) for prompt in self.body.prompts()]

    def encode(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            known, _ = tokenizer.replace_unknown(prompt)
            return tokenizer.encode(known) or self.engine.empty_prompt()
        if not all(0 <= i < tokenizer.vocab_size for i in prompt):
            raise UserError("The token ids of a prompt must be from 0 to "
                            f"{tokenizer.vocab_size - 1}.")
        return prompt

    def fit(self, ids: list[int]) -> list[int]:
        """The ids, cut to their end if the request says so. Raises ContextExceeded."""
        context, kept = self.engine.block_size, self.body.truncate_prompt_tokens
        if kept is not None:
            ids = ids[-min(kept if kept > 0 else context, context):]
        if len(ids) > context:
            raise ContextExceeded(
                f"This model's context is {context:,} tokens, but the prompt has {len(ids):,}: "
                "shorten it, or set truncate_prompt_tokens to -1 to keep only its end.")
        return ids

    async def opening(self, prompt: int) -> tuple[str, list[TokenInfo]]:
        """What precedes the choices of a prompt: its text and tokens, with `echo`."""
        if not self.body.echo:
            return "", []
        ids = self.prompts[prompt]
        empty = self.body.prompts()[prompt] == ""  # the engine put a token in its place
        text = "" if empty else self.engine.tokenizer.decode(ids)
        if self.body.logprobs is None:
            return text, []
        inspect = functools.partial(self.engine.inspect, ids, self.body.logprobs)
        tokens, offset = [], 0
        decode = self.engine.tokenizer.stream_decoder()
        for token in await run_in_threadpool(inspect):
            top = None if token["logprob"] is None else token["top"]
            tokens.append(TokenInfo(token["text"], offset, token["logprob"], top))
            offset += 0 if empty else len(decode([token["id"]]))
        return text, tokens

    def first_part(self, number: int, text: str, tokens: list[TokenInfo]) -> dict | None:
        """The choice with which a stream begins, if any."""
        return self.part(number, text, tokens, None) if self.body.echo else None

    def choice(self, number: int, text: str, tokens: list[TokenInfo], reason: str | None) -> dict:
        """A choice in OpenAI's format."""
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    None if token.top is None else dict([*token.top, (token.text, token.logprob)])
                    for token in tokens
                ],
                "text_offset": [token.offset for token in tokens],
            }
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    part = choice  # the next part of a choice, in a stream

    # ----------------------------------------------------------------------------------------------
    # Responses

    def numbered(self, batch: list[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        """(number of the choice, piece) for each piece of a batch; counts the tokens."""
        eot = self.engine.tokenizer.eot
        new = sum(piece.token is not None and piece.token.id != eot for _, piece in batch)
        if new and not self.completion_tokens:
            seconds = time.perf_counter() - self.started_at
            metrics.TIME_TO_FIRST_TOKEN.labels(self.body.model).observe(seconds)
        self.completion_tokens += new
        metrics.GENERATED_TOKENS.labels(self.body.model).inc(new)
        for prompt, piece in batch:
            yield prompt * self.n + piece.index, piece

    def token_infos(self, piece: Piece, offset: int) -> list[TokenInfo]:
        """The piece's token, if `logprobs` is set. `offset` is where the continuation begins."""
        token = piece.token
        if token is None or token.logprob is None:
            return []
        decode = self.engine.tokenizer.decode
        top = [(decode([i]), logprob) for i, logprob in token.top]
        return [TokenInfo(decode([token.id]), offset + piece.offset, token.logprob, top)]

    def usage(self) -> dict:
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    async def whole(self, is_disconnected: Callable[[], Awaitable[bool]]) -> dict:
        """The response, once all choices have ended; an incomplete one if the client has left."""
        checked_at = time.monotonic()

        async def client_left() -> bool:
            nonlocal checked_at
            if time.monotonic() - checked_at < DISCONNECT_CHECK_S:
                return False
            checked_at = time.monotonic()
            return await is_disconnected()

        texts, tokens, reasons, lengths = [], [], [], []
        with contextlib.closing(self.stream):
            for i in range(len(self.prompts)):
                text, prompt_tokens = await self.opening(i)
                if await client_left():
                    return {}
                texts += [text] * self.n
                tokens += [list(prompt_tokens) for _ in range(self.n)]
                reasons += [None] * self.n
                lengths += [len(text)] * self.n
            async for batch in self.stream:
                for i, piece in self.numbered(batch):
                    texts[i] += piece.text
                    tokens[i] += self.token_infos(piece, lengths[i])
                    reasons[i] = piece.reason
                if await client_left():
                    return {}
        choices = [self.choice(i, *parts) for i, parts in enumerate(zip(texts, tokens, reasons))]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def server_sent_events(self) -> AsyncIterator[str]:
        """The response as a stream of events, one for each piece of text."""
        options = self.body.stream_options
        head = {**self.head, "object": self.part_object}
        if options.include_usage:
            head["usage"] = None  # until the last event

        def event(**changes) -> str:
            return f"data: {json.dumps({**head, **changes})}\n\n"

        lengths = []
        try:
            with contextlib.closing(self.stream):
                for i in range(len(self.prompts)):
                    text, tokens = await self.opening(i)
                    lengths.append(len(text))
                    for number in range(i * self.n, (i + 1) * self.n):
                        if first := self.first_part(number, text, tokens):
                            yield event(choices=[first])
                async for batch in self.stream:
                    for i, piece in self.numbered(batch):
                        if piece.text or piece.token or piece.reason:
                            tokens = self.token_infos(piece, lengths[i // self.n])
                            yield event(choices=[self.part(i, piece.text, tokens, piece.reason)])
            if options.include_usage:
                yield event(choices=[], usage=self.usage())
        except Exception as error:  # the status is already sent, so the error becomes an event
            yield f"data: {json.dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"


class ChatCompletion(Completion):
    """A chat completion in progress. A base model continues a transcript.

    The response's "left_out" counts the oldest messages that no longer fit into the context.
    """
    id_prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def read_prompts(self) -> list[list[int]]:
        messages = [message.plain() for message in self.body.messages]
        if not any(message["role"] != "system" for message in messages):
            raise RequestError("Give at least one message of the user.", param="messages")
        if self.body.top_logprobs and not self.body.logprobs:
            raise RequestError("top_logprobs needs logprobs: set it to true.", param="logprobs")
        tokenizer, half = self.engine.tokenizer, self.engine.block_size // 2
        length = self.body.max_completion_tokens
        if length is None:
            length = half if self.body.max_tokens is None else self.body.max_tokens
        self.options["max_new_tokens"] = length
        self.options["logprobs"] = self.body.top_logprobs if self.body.logprobs else None
        self.options["stop"] += turn_ends(tokenizer, *SPEAKERS)
        # a longer reply passes the context's end like any text: the model then keeps half of it
        prompt, self.head["left_out"] = fit_prompt(
            self.engine, messages, *SPEAKERS, min(length, half))
        return [self.encode(prompt)]

    async def opening(self, prompt: int) -> tuple[str, list[TokenInfo]]:
        return "", []

    def first_part(self, number: int, text: str, tokens: list[TokenInfo]) -> dict:
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, number: int, text: str, tokens: list[TokenInfo], reason: str | None) -> dict:
        return {"index": number, "delta": {"content": text} if text else {},
                "logprobs": self.logprobs(tokens), "finish_reason": reason}

    def choice(self, number: int, text: str, tokens: list[TokenInfo], reason: str | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self.logprobs(tokens),
                "finish_reason": reason}

    def logprobs(self, tokens: list[TokenInfo]) -> dict | None:
        def entry(text: str, logprob: float) -> dict:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if not self.body.logprobs:
            return None
        content = [{**entry(token.text, token.logprob),
                    "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens]
        return {"content": content, "refusal": None}
