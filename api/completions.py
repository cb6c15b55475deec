"""Requests in progress: text completions and chat completions, whole or as a stream of events."""
import asyncio
import contextlib
import functools
import json
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from fastapi.concurrency import run_in_threadpool

from api import metrics, schema
from api.conversation import SPEAKERS, fit_prompt, turn_ends
from common.errors import UserError
from engine.reader import Piece, PieceStream, Reader
from engine.scheduler import Token
from generate import Engine

IDLE_S = 60  # nothing happens in an empty batch
SCORED = 2  # prompts at a time: other requests need threads, too


class Turns:
    """Scores a few prompts at a time; the clients take turns."""

    def __init__(self):
        self.places = asyncio.Semaphore(SCORED)
        # a client waits for places with as many prompts as there are places; its others wait here
        self.clients = weakref.WeakValueDictionary()  # client -> Semaphore

    async def score(self, client: str | None, inspect: Callable[[], list[dict]]) -> list[dict]:
        """The result of `inspect`, which runs in a thread."""
        own = self.clients.setdefault(client, asyncio.Semaphore(SCORED))
        async with own, self.places:
            return await run_in_threadpool(inspect)


class Part(NamedTuple):
    """What is added to a choice."""
    number: int  # of the choice
    text: str
    # if `logprobs` is set: the tokens, and where each begins in the choice's text, in characters
    tokens: list[tuple[Token, int]]
    reason: str | None = None  # why the text ends here, if it does


def join(parts: list[Part]) -> Part:
    """The parts of a choice as one."""
    tokens = [token for part in parts for token in part.tokens]
    return Part(parts[0].number, "".join(part.text for part in parts), tokens, parts[-1].reason)


class Completion:
    """A text completion in progress: `n` choices for each prompt. Raises UserError, and Busy.

    Choice i belongs to prompt i // n. The request ends when the object is garbage-collected, for
    example because the client has disconnected. Requests of one `client` share its places, and
    `turns` gives the clients their turns to have prompts scored.
    """
    id_prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, body: schema.GenerationRequest, turns: Turns,
                 client: str | None = None):
        self.engine, self.body, self.n = engine, body, body.n
        self.turns, self.client = turns, client
        self.started_at = time.perf_counter()
        self.completion_tokens = 0
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "object": self.whole_object,
                     "created": int(time.time()), "model": body.model}
        self.options = body.sampling()
        self.prompts = self.read_prompts()  # token ids

        # submit the prompts; if one fails, cancel the others
        requests = []
        try:
            for ids in self.prompts:
                requests.append(engine.submit(ids, self.n, client, **self.options))
        except UserError:
            for request in requests:
                request.cancel()
            raise
        self.stream = PieceStream([Reader(engine.tokenizer, each) for each in requests], IDLE_S)
        metrics.PROMPT_TOKENS.labels(body.model).inc(sum(map(len, self.prompts)))

    # ----------------------------------------------------------------------------------------------
    # Prompts

    def read_prompts(self) -> list[list[int]]:
        """The prompts' token ids. Completes the options."""
        self.options["logprobs"] = self.body.logprobs
        prompts = self.body.prompts()
        self.check_size(len(prompts))
        return [self.encode(prompt) for prompt in prompts]

    def check_size(self, prompts: int):
        """Raises UserError if the request asks for too much."""
        tokens = prompts * self.n * self.options["max_new_tokens"]
        if prompts > schema.MAX_PROMPTS or tokens > schema.MAX_NEW_TOKENS:
            raise UserError(
                f"A request can have at most {schema.MAX_PROMPTS} prompts and generate at most "
                f"{schema.MAX_NEW_TOKENS:,} tokens, but this one has {prompts:,} prompts "
                f"and asks for {tokens:,} tokens.")

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The prompt's ids, cut to their end if the request says so. Raises ContextExceeded."""
        tokenizer, context = self.engine.tokenizer, self.engine.block_size
        kept, max_chars = self.body.truncate_prompt_tokens, self.engine.max_chars
        if isinstance(prompt, str):
            text, _ = tokenizer.replace_unknown(prompt)
            # encoding takes time, so do not encode what cannot fit
            if kept is None and len(text) > max_chars:
                raise self.context_exceeded(f"{len(text):,} characters")
            # twice the most that fits, because where a text begins can change its first tokens
            ids = tokenizer.encode(text[-2 * max_chars:]) or self.engine.empty_prompt()
        elif all(0 <= i < tokenizer.vocab_size for i in prompt):
            ids = prompt
        else:
            raise UserError("The token ids of a prompt must be from 0 to "
                            f"{tokenizer.vocab_size - 1}.")
        if kept is not None:
            ids = ids[-min(kept if kept > 0 else context, context):]
        if len(ids) > context:
            raise self.context_exceeded(f"{len(ids):,}")
        return ids

    def context_exceeded(self, size: str) -> schema.ContextExceeded:
        return schema.ContextExceeded(
            f"This model's context is {self.engine.block_size:,} tokens, but the prompt has "
            f"{size}: shorten it, or set truncate_prompt_tokens to -1 to keep only its end.")

    async def echo(self, prompt: int) -> tuple[str, list[tuple[Token, int]]]:
        """What precedes the choices of a prompt, if `echo` is set: its text and tokens.

        Its first token has no log-probability.
        """
        if not self.body.echo:
            return "", []
        ids = self.prompts[prompt]
        # an empty prompt has a token, but no text
        count = 0 if self.body.prompts()[prompt] == "" else len(ids)
        text = self.engine.tokenizer.decode(ids[:count])
        if self.body.logprobs is None:
            return text, []
        tokens, offset = [], 0
        decode = self.engine.tokenizer.stream_decoder()
        inspect = functools.partial(self.engine.inspect, ids, self.body.logprobs)
        for token in await self.turns.score(self.client, inspect):
            tokens.append((Token(token["id"], token["logprob"], token["top"]), offset))
            offset += len(decode([token["id"]])) if count else 0
        return text, tokens

    # ----------------------------------------------------------------------------------------------
    # Responses

    async def parts(self) -> AsyncIterator[Part]:
        """The choices' beginnings, then what is generated as it arrives."""
        with contextlib.closing(self.stream):
            lengths = []
            for i in range(len(self.prompts)):
                text, tokens = await self.echo(i)
                lengths.append(len(text))
                for number in range(i * self.n, (i + 1) * self.n):
                    yield Part(number, text, tokens)
            begun = set()  # choices that have text
            async for batch in self.stream:
                for i, piece in batch:
                    self.count(piece)
                    number = i * self.n + piece.index
                    text = piece.text if number in begun else self.begin(piece.text)
                    tokens = []
                    if piece.token and piece.token.logprob is not None:
                        tokens = [(piece.token, lengths[i] + piece.offset)]
                    if text:
                        begun.add(number)
                    if text or tokens or piece.reason:
                        yield Part(number, text, tokens, piece.reason)

    def begin(self, text: str) -> str:
        """The beginning of a choice's text."""
        return text

    def count(self, piece: Piece):
        if piece.token is None or piece.token.id == self.engine.tokenizer.eot:
            return
        self.completion_tokens += 1
        metrics.GENERATED_TOKENS.labels(self.body.model).inc()
        if self.completion_tokens == 1:
            seconds = time.perf_counter() - self.started_at
            metrics.TIME_TO_FIRST_TOKEN.labels(self.body.model).observe(seconds)

    def usage(self) -> dict:
        prompt_tokens = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": prompt_tokens + self.completion_tokens}

    async def whole(self) -> dict:
        """The response, once all choices have ended."""
        choices = [[] for _ in range(len(self.prompts) * self.n)]  # their parts
        async for part in self.parts():
            choices[part.number].append(part)
        choices = [self.choice(join(parts)) for parts in choices]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def server_sent_events(self) -> AsyncIterator[str]:
        """The response as a stream of events."""
        with_usage = self.body.stream_options.include_usage
        head = {**self.head, "object": self.part_object}
        if with_usage:
            head["usage"] = None  # until the last event

        def event(body: dict) -> str:
            return f"data: {json.dumps(body)}\n\n"

        try:
            async for part in self.parts():
                yield event({**head, "choices": [self.delta(part)]})
                # if the client has left, the server learns it now, before it writes again
                await asyncio.sleep(0)
            if with_usage:
                yield event({**head, "choices": [], "usage": self.usage()})
        except Exception as error:  # the status is already sent, so the error becomes an event
            yield event(schema.error_body(error))
        yield "data: [DONE]\n\n"

    def choice(self, part: Part) -> dict:
        """A choice, or what is added to one, in OpenAI's format."""
        return {"index": part.number, "text": part.text, "logprobs": self.logprobs(part.tokens),
                "finish_reason": part.reason}

    delta = choice

    def logprobs(self, tokens: list[tuple[Token, int]]) -> dict | None:
        if self.body.logprobs is None:
            return None
        tops = []
        for token, _ in tokens:
            top = [*token.top, (token.id, token.logprob)]
            spelled = {self.spell(i): logprob for i, logprob in top}
            tops.append(None if token.logprob is None else spelled)
        return {"tokens": [self.spell(token.id) for token, _ in tokens],
                "token_logprobs": [token.logprob for token, _ in tokens],
                "top_logprobs": tops,
                "text_offset": [offset for _, offset in tokens]}

    def spell(self, token_id: int) -> str:
        """The token's text. As in OpenAI's completions, a part of a character is `bytes:\\xe2`."""
        content = self.engine.tokenizer.decode_bytes([token_id])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + content.decode(errors="backslashreplace")


class ChatCompletion(Completion):
    """A chat completion in progress. A base model continues a transcript.

    The response's "left_out" counts the oldest messages that no longer fit into the context.
    """
    id_prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def read_prompts(self) -> list[list[int]]:
        messages = [message.plain() for message in self.body.messages]
        if all(message["role"] == "system" for message in messages):
            raise schema.RequestError("Give at least one message of the user.", param="messages")
        if self.body.top_logprobs and not self.body.logprobs:
            raise schema.RequestError("top_logprobs needs logprobs: true.", param="logprobs")
        half = self.engine.block_size // 2
        self.options["max_new_tokens"] = self.body.length(default=half)
        self.options["logprobs"] = self.body.top_logprobs if self.body.logprobs else None
        self.options["stop"] += turn_ends(self.engine.tokenizer, *SPEAKERS)
        self.check_size(1)
        # past half a context a reply continues like any text, with the last half as its context
        prompt, self.head["left_out"] = fit_prompt(
            self.engine, messages, *SPEAKERS, min(self.options["max_new_tokens"], half))
        return [prompt if isinstance(prompt, list) else self.engine.encode(prompt)[0]]

    async def echo(self, prompt: int) -> tuple[str, list[tuple[Token, int]]]:
        return "", []

    def begin(self, text: str) -> str:
        return text.lstrip()  # templates add the space after the speaker's name themselves

    def choice(self, part: Part) -> dict:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": part.number, "message": message, "logprobs": self.logprobs(part.tokens),
                "finish_reason": part.reason}

    def delta(self, part: Part) -> dict:
        added = {"content": part.text} if part.text else {}
        if not part.text and not part.tokens and not part.reason:  # the beginning
            added = {"role": "assistant", "content": ""}
        return {"index": part.number, "delta": added, "logprobs": self.logprobs(part.tokens),
                "finish_reason": part.reason}

    def logprobs(self, tokens: list[tuple[Token, int]]) -> dict | None:
        def entry(token_id: int, logprob: float) -> dict:
            content = self.engine.tokenizer.decode_bytes([token_id])
            # as in OpenAI's chats, a part of a character is \xe2\x80, without the prefix bytes:
            return {"token": content.decode(errors="backslashreplace"), "logprob": logprob,
                    "bytes": list(content)}

        if not self.body.logprobs:
            return None
        content = [{**entry(token.id, token.logprob),
                    "top_logprobs": [entry(*pair) for pair in token.top]} for token, _ in tokens]
        return {"content": content, "refusal": None}
