"""Requests in progress: text completions and chat completions, whole or as a stream of events."""
import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastapi.concurrency import run_in_threadpool

from api import metrics, schema
from api.conversation import SPEAKERS, fit_prompt, turn_ends
from common.errors import UserError
from engine.likelihood import encode
from engine.reader import Piece, PieceStream, Reader
from engine.scheduler import Token
from generate import Engine

IDLE_S = 60  # nothing happens in an empty batch
SCORING = asyncio.Semaphore(2)  # prompts scored at a time: other requests need threads, too


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
    example because the client has disconnected. Requests of one `client` share its places.
    """
    id_prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, body: schema.GenerationRequest, client: str | None = None):
        self.engine, self.body, self.n = engine, body, body.n
        self.started_at = time.perf_counter()
        self.completion_tokens = 0
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "object": self.whole_object,
                     "created": int(time.time()), "model": body.model}
        self.options = body.sampling()
        self.prompts = self.read_prompts()  # token ids

        # bound what one request can ask for
        tokens = len(self.prompts) * self.n * self.options["max_new_tokens"]
        if len(self.prompts) > schema.MAX_PROMPTS or tokens > schema.MAX_NEW_TOKENS:
            raise UserError(
                f"A request can have at most {schema.MAX_PROMPTS} prompts and generate at most "
                f"{schema.MAX_NEW_TOKENS:,} tokens, but this one has {len(self.prompts):,} prompts "
                f"and asks for {tokens:,} tokens.")

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
        return [self.fit(self.encode(prompt)) for prompt in self.body.prompts()]

    def encode(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            return encode(tokenizer, prompt) or self.engine.empty_prompt()
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
            raise schema.ContextExceeded(
                f"This model's context is {context:,} tokens, but the prompt has {len(ids):,}: "
                "shorten it, or set truncate_prompt_tokens to -1 to keep only its end.")
        return ids

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
        async with SCORING:
            inspected = await run_in_threadpool(inspect)
        for token in inspected:
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
        # past half a context a reply continues like any text, with the last half as its context
        prompt, self.head["left_out"] = fit_prompt(
            self.engine, messages, *SPEAKERS, min(self.options["max_new_tokens"], half))
        return [self.encode(prompt)]

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
