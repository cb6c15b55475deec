"""The engine under OpenAI's API: any of its clients writes with our models.

    python serve.py -m bundled --port 8000                   # and app.py serves the same beside the page
    curl http://127.0.0.1:8000/v1/completions -d '{"model": "bundled", "prompt": "Once", "seed": 1, "stream": true}'

`/v1/completions` and `/v1/models`, as https://platform.openai.com/docs/api-reference/completions has them.
"""
import asyncio
import dataclasses
import errno
import functools
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import pydantic
import tyro
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from checkpoint import describe, load_model
from common.errors import UserError, report_user_errors
from ddp import pick_device
from engine import scheduler
from engine.packed import use_allowed_cores
from generate import Dtype, Engine, Piece, Reader

MAX_PROMPTS = 16  # of one request


class StreamOptions(pydantic.BaseModel, extra="forbid"):
    include_usage: bool = False


class Completion(pydantic.BaseModel, extra="forbid"):
    """The body of a request; top_k and repetition_penalty are not OpenAI's, other servers have them too."""
    model: str
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: int | None = pydantic.Field(16, ge=0, le=100_000)
    temperature: float | None = pydantic.Field(1.0, ge=0, le=2)
    top_p: float | None = pydantic.Field(1.0, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=1)
    repetition_penalty: float = pydantic.Field(1.0, gt=0)
    n: int | None = pydantic.Field(1, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    echo: bool | None = False
    stop: str | list[str] | None = None
    seed: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = pydantic.Field(0, ge=0, le=0)  # known, and not offered
    frequency_penalty: float | None = pydantic.Field(0, ge=0, le=0)
    logit_bias: dict[str, float] | None = pydantic.Field(None, max_length=0)
    suffix: str | None = pydantic.Field(None, max_length=0)
    user: str | None = None

    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


def failure(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


NOT_OFFERED = ("presence_penalty", "frequency_penalty", "logit_bias", "suffix")


def failed(error: Exception) -> tuple[int, dict]:
    """(HTTP status, body) of what went wrong, in OpenAI's shape."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if param in NOT_OFFERED:
            return 400, failure(400, f"{param} is not offered here.", param)
        return 400, failure(400, f"{param}: {first['msg']}" if param else "The body is a JSON object.", param)
    if isinstance(error, KeyError):
        return 404, failure(404, f"There is no model {error.args[0]!r} here; /v1/models lists those there are.", "model",
                            "model_not_found")
    if isinstance(error, scheduler.Busy):
        return 429, failure(429, str(error), code="busy")
    if isinstance(error, UserError | UnicodeError | json.JSONDecodeError):
        return 400, failure(400, str(error))
    return 500, failure(500, f"{type(error).__name__} while this was written.")


def routes(names: list[str], engine: Callable[[str], Engine]) -> APIRouter:
    """The API over `engine(name)` of each of `names`."""
    router, created = APIRouter(prefix="/v1"), int(time.time())

    def describe_model(name: str) -> dict:
        if name not in names:
            raise KeyError(name)
        return {"id": name, "object": "model", "created": created, "owned_by": "gpt-2-from-scratch"}

    @router.get("/models")
    def models():
        return {"object": "list", "data": [describe_model(name) for name in names]}

    @router.get("/models/{name:path}")
    def model(name: str):
        try:
            return describe_model(name)
        except KeyError as error:
            status, body = failed(error)
            return JSONResponse(body, status)

    @router.post("/completions")
    async def completions(http: Request):
        try:
            asked = Completion.model_validate(await http.json())
            describe_model(asked.model)
            answer = await run_in_threadpool(Answer, await run_in_threadpool(engine, asked.model), asked)
            if asked.stream:
                return StreamingResponse(answer.server_sent_events(), media_type="text/event-stream")
            return await answer.whole(http.is_disconnected)
        except Exception as error:
            status, body = failed(error)
            if status == 500:
                raise
            return JSONResponse(body, status)

    @router.api_route("/{rest:path}", methods=["GET", "POST"])
    def others(rest: str):
        return JSONResponse(failure(404, f"There is no /v1/{rest} here: a base model continues texts, by /v1/completions."), 404)

    return router


class Answer:
    """What comes of a request: `n` choices for each prompt. Raises UserError for what cannot be, and Busy."""

    def __init__(self, engine: Engine, asked: Completion):
        self.engine, self.asked, self.n = engine, asked, asked.n or 1
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                     "model": asked.model}
        prompts = asked.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise UserError(f"A request has at most {MAX_PROMPTS} prompts.")
        if asked.best_of not in (None, self.n):
            raise UserError("best_of is not offered here.")
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        options = {"max_new_tokens": 16 if asked.max_tokens is None else asked.max_tokens, "stop": stop, "seed": asked.seed,
                   "temperature": 1.0 if asked.temperature is None else asked.temperature,
                   "top_p": 1.0 if asked.top_p is None else asked.top_p, "top_k": asked.top_k,
                   "repetition_penalty": asked.repetition_penalty, "logprobs": asked.logprobs}
        self.prompts = [engine.encode(prompt)[0] if isinstance(prompt, str) else self.validate_ids(prompt) for prompt in prompts]
        self.echoes = [self.echo(prompt, ids) if asked.echo else None for prompt, ids in zip(prompts, self.prompts)]
        self.requests = []
        try:
            for ids in self.prompts:
                self.requests.append(engine.submit(ids, self.n, **options))
        except UserError:
            self.cancel()
            raise
        self.lengths = [0] * len(prompts) * self.n  # characters of each choice so far
        self.tokens = 0

    def validate_ids(self, ids: list[int]) -> list[int]:
        if not all(0 <= i < self.engine.tokenizer.vocab_size for i in ids):
            raise UserError(f"A prompt of token ids has ids from 0 to {self.engine.tokenizer.vocab_size - 1}.")
        return ids[-self.engine.block_size:]

    def echo(self, prompt: str | list[int], ids: list[int]) -> tuple[str, list | None]:
        """(the prompt's text, its tokens with their log-probabilities where these are asked for)."""
        text = prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(ids)
        if self.asked.logprobs is None:
            return text, None
        tokens = self.engine.inspect(ids, self.asked.logprobs)
        return text, [(token["text"], token["logprob"], token["top"] if token["logprob"] else None) for token in tokens]

    def cancel(self):
        for request in self.requests:
            request.cancel()

    async def pieces(self, gone=None) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the choice, piece), as they come, until all choices have ended or the client is `gone`."""
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        readers = [Reader(self.engine.tokenizer, request) for request in self.requests]
        for request in self.requests:
            request.wake = functools.partial(loop.call_soon_threadsafe, arrived.set)
        try:
            while any(len(reader.over) < self.n for reader in readers):
                for p, (request, reader) in enumerate(zip(self.requests, readers)):
                    while not request.events.empty():
                        event = request.events.get()
                        if isinstance(event, Exception):
                            raise event
                        for piece in reader.read(event):
                            self.tokens += piece.token is not None
                            yield p * self.n + piece.index, piece
                            if piece.reason:
                                request.cancel(piece.index)
                try:
                    await asyncio.wait_for(arrived.wait(), 0.5)
                except TimeoutError:
                    if gone and await gone():
                        return
                arrived.clear()
        finally:
            for request in self.requests:
                request.wake = None
            self.cancel()

    def choice(self, number: int, text: str, tokens: list, reason: str | None) -> dict:
        """A choice, or a part of one, in OpenAI's shape; tokens are (text, log-probability, likeliest) each."""
        offset, logprobs = self.lengths[number], None
        self.lengths[number] += len(text)
        if self.asked.logprobs is not None:
            offsets = itertools.accumulate((len(token) for token, _, _ in tokens), initial=offset)
            logprobs = {"tokens": [token for token, _, _ in tokens], "token_logprobs": [p for _, p, _ in tokens],
                        "top_logprobs": [None if top is None else dict([*top, (token, p)]) for token, p, top in tokens],
                        "text_offset": list(offsets)[:-1]}
        reason = "length" if reason == "deadline" else reason
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def named(self, piece: Piece) -> list:
        """The piece's token with its log-probabilities, where these are asked for."""
        if piece.token is None or piece.token.logprob is None:
            return []
        decode = self.engine.tokenizer.decode
        return [(decode([piece.token.id]), piece.token.logprob, [(decode([i]), logprob) for i, logprob in piece.token.top])]

    def usage(self) -> dict:
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}

    def echoed(self, number: int) -> tuple[str, list]:
        text, tokens = self.echoes[number // self.n] or ("", [])
        return text, tokens or []

    async def whole(self, gone) -> dict:
        numbers = range(len(self.lengths))
        texts, tokens, reasons = [""] * len(numbers), [[] for _ in numbers], [None] * len(numbers)
        for i in numbers:
            texts[i], tokens[i] = self.echoed(i)[0], list(self.echoed(i)[1])
        async for i, piece in self.pieces(gone):
            texts[i] += piece.text
            tokens[i] += self.named(piece)
            reasons[i] = piece.reason
        return {**self.head, "choices": [self.choice(i, texts[i], tokens[i], reasons[i]) for i in numbers],
                "usage": self.usage()}

    async def server_sent_events(self) -> AsyncIterator[str]:
        def event(body: dict) -> str:
            return f"data: {json.dumps(body)}\n\n"

        try:
            if self.asked.echo:
                for i in range(len(self.lengths)):
                    yield event({**self.head, "choices": [self.choice(i, *self.echoed(i), None)]})
            async for i, piece in self.pieces():
                if piece.text or piece.token or piece.reason:
                    yield event({**self.head, "choices": [self.choice(i, piece.text, self.named(piece), piece.reason)]})
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield event({**self.head, "choices": [], "usage": self.usage()})
        except Exception as error:
            yield event(failed(error)[1])
        yield "data: [DONE]\n\n"


@dataclasses.dataclass
class ServeConfig:
    """Serves a model under OpenAI's API."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt, a Hugging Face folder or Hub id; the newest run or `bundled` when not given."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA; on a CPU int8 for models of 20 million parameters or more, and float32 for smaller ones."""


def check_port(host: str, port: int):
    """Raises UserError for an address where nothing can listen."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            if server.getsockname()[1] != port:  # 0 asks for any port
                raise OverflowError("ports are numbered from 1")
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", None) in errno.errorcode else error
        raise UserError(f"Nothing can listen on {host}:{port} ({reason}): choose another --port or --host.") from None


def main(config: ServeConfig):
    check_port(config.host, config.port)
    use_allowed_cores()
    model, tokenizer, info = load_model(config.model, pick_device(config.device))
    engine, name = Engine(model, tokenizer, config.dtype), config.model or info["name"]
    app = FastAPI(title="GPT-2 From Scratch")
    app.include_router(routes([name], lambda _: engine))
    print(f"{name}: {describe(info)}; {engine.dtype} on {engine.device}, {engine.forward.backend}")
    print(f"http://{config.host}:{config.port}/v1 serves it; Ctrl-C ends that", flush=True)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(ServeConfig))
