"""Serves a model under OpenAI's completions API, so that any OpenAI client can use it.

    python serve.py -m bundled --port 8000                   # app.py serves the same API
    curl http://127.0.0.1:8000/v1/completions \\
        -d '{"model": "bundled", "prompt": "Once", "seed": 1, "stream": true}'

The endpoints are `/v1/completions` and `/v1/models`; their reference is
https://platform.openai.com/docs/api-reference/completions.
"""
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, NamedTuple

from common.errors import UserError, report_user_errors  # first, so that Ctrl-C is quiet

# isort: split
import pydantic
import tyro
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from checkpoint import describe, load_model
from ddp import pick_device
from engine.packed import use_allowed_cores
from engine.scheduler import Busy
from generate import Dtype, Engine, Piece, PieceStream, Reader

MAX_PROMPTS = 16  # in one request
DISCONNECT_CHECK_S = 0.5  # how often to check that the client is still connected


# --------------------------------------------------------------------------------------------------
# Requests and errors

class StreamOptions(pydantic.BaseModel, extra="forbid"):
    include_usage: bool = False


class CompletionRequest(pydantic.BaseModel, extra="forbid"):
    """The body of a request. top_k and repetition_penalty are extensions that vLLM has too."""
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
    user: str | None = None
    # part of OpenAI's API, but only their defaults are supported
    best_of: int | None = None
    presence_penalty: float | None = pydantic.Field(0, ge=0, le=0)
    frequency_penalty: float | None = pydantic.Field(0, ge=0, le=0)
    logit_bias: dict[str, float] | None = pydantic.Field(None, max_length=0)
    suffix: str | None = pydantic.Field(None, max_length=0)

    def prompts(self) -> list[str | list[int]]:
        """The prompt or prompts, as a list."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]

    def sampling(self) -> dict:
        """The options for `Engine.submit`. A null stands for OpenAI's default."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {
            "max_new_tokens": 16 if self.max_tokens is None else self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": self.top_k,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": stop,
            "seed": self.seed,
            "logprobs": self.logprobs,
        }


UNSUPPORTED = ("presence_penalty", "frequency_penalty", "logit_bias", "suffix")
ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


class ModelNotFound(UserError):
    """The server does not offer the model."""


def error_body(status: int, message: str, param: str | None = None,
               code: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> tuple[int, dict]:
    """(HTTP status, body) for an error, in OpenAI's format."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        if not first["loc"]:
            return 400, error_body(400, "The body must be a JSON object.")
        param = str(first["loc"][0])
        if param in UNSUPPORTED:
            return 400, error_body(400, f"{param} is not supported: leave it out.", param)
        return 400, error_body(400, f"{param}: {first['msg']}", param)
    if isinstance(error, ModelNotFound):
        return 404, error_body(404, str(error), "model", "model_not_found")
    if isinstance(error, Busy):
        return 429, error_body(429, str(error), code="busy")
    if isinstance(error, UserError | UnicodeError | json.JSONDecodeError):
        return 400, error_body(400, str(error))
    return 500, error_body(500, f"The server failed with {type(error).__name__}.")


# --------------------------------------------------------------------------------------------------
# Endpoints

def routes(names: list[str], engine: Callable[[str], Engine]) -> APIRouter:
    """The API for the models in `names`; `engine(name)` gives a model's engine."""
    router = APIRouter(prefix="/v1")
    created = int(time.time())

    def describe_model(name: str) -> dict:
        if name not in names:
            raise ModelNotFound(f"The model {name!r} does not exist: /v1/models lists the models.")
        return {"id": name, "object": "model", "created": created, "owned_by": "gpt-2-from-scratch"}

    @router.get("/models")
    def list_models():
        return {"object": "list", "data": [describe_model(name) for name in names]}

    @router.get("/models/{name:path}")
    def retrieve_model(name: str):
        try:
            return describe_model(name)
        except ModelNotFound as error:
            status, body = error_response(error)
            return JSONResponse(body, status)

    @router.post("/completions")
    async def create_completion(http: Request):
        try:
            body = CompletionRequest.model_validate(await http.json())
            describe_model(body.model)
            # loading a model and encoding prompts would block the event loop
            model_engine = await run_in_threadpool(engine, body.model)
            completion = await run_in_threadpool(Completion, model_engine, body)
            if body.stream:
                events = completion.server_sent_events()
                return StreamingResponse(events, media_type="text/event-stream")
            return await completion.whole(http.is_disconnected)
        except Exception as error:
            status, body = error_response(error)
            if status == 500:
                raise
            return JSONResponse(body, status)

    @router.api_route("/{rest:path}", methods=["GET", "POST"])
    def not_found(rest: str):
        message = (f"/v1/{rest} does not exist: use /v1/completions, "
                   "because these models continue texts.")
        return JSONResponse(error_body(404, message), 404)

    return router


# --------------------------------------------------------------------------------------------------
# Completions

class TokenInfo(NamedTuple):
    """A token for the `logprobs` of a response."""
    text: str
    logprob: float | None  # nats; None for the first token of a prompt
    top: list[tuple[str, float]] | None


class Completion:
    """A request in progress: `n` choices for each prompt. Raises UserError, and Busy.

    Choice i belongs to prompt i // n. The request ends when the object is garbage-collected, for
    example because the client has disconnected.
    """

    def __init__(self, engine: Engine, body: CompletionRequest):
        self.engine, self.body = engine, body
        self.n = body.n or 1
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        prompts = body.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise UserError(f"A request can have at most {MAX_PROMPTS} prompts.")
        if body.best_of not in (None, self.n):
            raise UserError("best_of is not supported: leave it out.")

        # encode the prompts
        self.prompts = []
        self.echoes = []
        for prompt in prompts:
            ids = engine.encode(prompt)[0] if isinstance(prompt, str) else self.check_ids(prompt)
            self.prompts.append(ids)
            self.echoes.append(self.echo(prompt, ids))

        # submit them; if one fails, cancel the others
        requests = []
        try:
            for ids in self.prompts:
                requests.append(engine.submit(ids, self.n, **body.sampling()))
        except UserError:
            for request in requests:
                request.cancel()
            raise
        readers = [Reader(engine.tokenizer, request) for request in requests]
        self.stream = PieceStream(readers, DISCONNECT_CHECK_S)
        self.lengths = [0] * len(prompts) * self.n  # characters sent of each choice
        self.completion_tokens = 0

    def check_ids(self, ids: list[int]) -> list[int]:
        vocab_size = self.engine.tokenizer.vocab_size
        if not all(0 <= i < vocab_size for i in ids):
            raise UserError(f"The token ids of a prompt must be from 0 to {vocab_size - 1}.")
        return ids[-self.engine.block_size:]

    def echo(self, prompt: str | list[int], ids: list[int]) -> tuple[str, list[TokenInfo]]:
        """What `echo` puts before a choice: the prompt, and its tokens if `logprobs` is set."""
        if not self.body.echo:
            return "", []
        text = prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(ids)
        if self.body.logprobs is None:
            return text, []
        tokens = []
        for token in self.engine.inspect(ids, self.body.logprobs):
            top = None if token["logprob"] is None else token["top"]
            tokens.append(TokenInfo(token["text"], token["logprob"], top))
        return text, tokens

    def numbered(self, batch: list[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        """(number of the choice, piece) for each piece of a batch; counts the tokens."""
        for prompt, piece in batch:
            self.completion_tokens += piece.token is not None
            yield prompt * self.n + piece.index, piece

    def token_info(self, piece: Piece) -> list[TokenInfo]:
        """The piece's token, if `logprobs` is set."""
        token = piece.token
        if token is None or token.logprob is None:
            return []
        decode = self.engine.tokenizer.decode
        top = [(decode([i]), logprob) for i, logprob in token.top]
        return [TokenInfo(decode([token.id]), token.logprob, top)]

    def choice(self, number: int, text: str, tokens: list[TokenInfo], reason: str | None) -> dict:
        """A choice, or the next part of one, in OpenAI's format."""
        start = self.lengths[number]
        self.lengths[number] += len(text)
        logprobs = None
        if self.body.logprobs is not None:
            ends = itertools.accumulate((len(token.text) for token in tokens), initial=start)
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    None if token.top is None else dict([*token.top, (token.text, token.logprob)])
                    for token in tokens
                ],
                "text_offset": list(ends)[:-1],
            }
        if reason == "deadline":  # OpenAI's API has no such reason
            reason = "length"
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def usage(self) -> dict:
        prompt_tokens = sum(len(ids) for ids in self.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    async def whole(self, is_disconnected: Callable[[], Awaitable[bool]]) -> dict:
        """The response, once all choices have ended; an incomplete one if the client has left."""
        texts, tokens, reasons = [], [], []
        for i in range(len(self.lengths)):
            prompt, prompt_tokens = self.echoes[i // self.n]
            texts.append(prompt)
            tokens.append(list(prompt_tokens))
            reasons.append(None)
        with contextlib.closing(self.stream):
            checked = time.monotonic()
            async for batch in self.stream:
                for i, piece in self.numbered(batch):
                    texts[i] += piece.text
                    tokens[i] += self.token_info(piece)
                    reasons[i] = piece.reason
                if time.monotonic() - checked > DISCONNECT_CHECK_S:
                    checked = time.monotonic()
                    if await is_disconnected():
                        break
        choices = [self.choice(i, *parts) for i, parts in enumerate(zip(texts, tokens, reasons))]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def server_sent_events(self) -> AsyncIterator[str]:
        """The response as a stream of events, one for each piece of text."""
        def event(body: dict) -> str:
            return f"data: {json.dumps(body)}\n\n"

        def part(*choice) -> str:
            return event({**self.head, "choices": [self.choice(*choice)]})

        try:
            if self.body.echo:
                for i in range(len(self.lengths)):
                    yield part(i, *self.echoes[i // self.n], None)
            with contextlib.closing(self.stream):
                async for batch in self.stream:
                    for i, piece in self.numbered(batch):
                        if piece.text or piece.token or piece.reason:
                            yield part(i, piece.text, self.token_info(piece), piece.reason)
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield event({**self.head, "choices": [], "usage": self.usage()})
        except Exception as error:  # the status is already sent, so the error becomes an event
            yield event(error_response(error)[1])
        yield "data: [DONE]\n\n"


# --------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class ServeConfig:
    """Serves a model under OpenAI's API."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt file, a Hugging Face folder or a Hub id. Default: the
    newest run, or the bundled model if there is none."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: int = 8000
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA; on a CPU int8 for models with 20 million parameters or more, and
    float32 for smaller ones."""


def check_port(host: str, port: int):
    """Raises UserError if a server cannot listen on the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as server:
            if server.getsockname()[1] != port:  # port 0 is any free port
                raise OverflowError("ports are numbered from 1")
    except (OSError, OverflowError) as error:
        known = getattr(error, "errno", None) in errno.errorcode
        reason = os.strerror(error.errno) if known else error
        raise UserError(f"Cannot listen on {host}:{port} ({reason}): "
                        "choose another --port or --host.") from None


def main(config: ServeConfig):
    check_port(config.host, config.port)
    use_allowed_cores()
    model, tokenizer, info = load_model(config.model, pick_device(config.device))
    engine = Engine(model, tokenizer, config.dtype)
    name = config.model or info["name"]
    app = FastAPI(title="GPT-2 From Scratch")
    app.include_router(routes([name], lambda _: engine))
    backend = f"{engine.dtype} on {engine.device}, {engine.forward.backend}"
    print(f"{name}: {describe(info)}; {backend}")
    print(f"Serving at http://{config.host}:{config.port}/v1; press Ctrl-C to stop", flush=True)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(ServeConfig))
