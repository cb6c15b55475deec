"""Serves a model under OpenAI's API, so that any OpenAI client can use it.

    python serve.py -m bundled --port 8000                   # app.py serves the same API
    curl http://127.0.0.1:8000/v1/completions \\
        --json '{"model": "bundled", "prompt": "Once", "seed": 1, "stream": true}'

The endpoints are `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`;
docs/api.md says how they differ from OpenAI's. The files in api/ implement them.
"""
import asyncio
import dataclasses
import errno
import os
import socket
import time
from collections.abc import Callable

from common.program import report_user_errors

import tyro
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from api import metrics
from api.completions import ChatCompletion, Completion, Turns
from api.guard import Access, Guard
from api.schema import ChatRequest, CompletionRequest, RequestError, error_answer
from checkpoint import describe, list_bundled
from common.errors import UserError
from engine.packed import use_allowed_cores
from generate import Engine, ModelConfig

DISCONNECT_CHECK_S = 0.5  # how often to check that a client who waits is still connected
GRACE_S = 3  # how long texts can continue after SIGTERM or Ctrl-C
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]
GENERATE = {"completions": (CompletionRequest, Completion),
            "chat/completions": (ChatRequest, ChatCompletion)}


# --------------------------------------------------------------------------------------------------
# Endpoints

def routes(names: list[str], engine: Callable[[str], Engine]) -> APIRouter:
    """The API for the models in `names`; `engine(name)` gives a model's engine."""
    router, turns = APIRouter(), Turns()
    created = int(time.time())

    def describe_model(name: str) -> dict:
        return {"id": name, "object": "model", "created": created, "owned_by": "gpt-2-from-scratch"}

    @router.get("/health")
    @router.head("/health", include_in_schema=False)  # probes send HEAD
    async def health():
        return {"status": "ok"}

    @router.get("/metrics")
    async def show_metrics():
        return metrics.render()

    @router.get("/v1/models")
    @router.get("/v1/models/", include_in_schema=False)
    @router.head("/v1/models", include_in_schema=False)
    async def list_models():
        return {"object": "list", "data": [describe_model(name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str):
        try:
            return describe_model(find_name(name, names))
        except UserError as error:
            return error_answer(error)

    # the last route: it takes whatever the others do not
    @router.api_route("/v1/{endpoint:path}", methods=METHODS, include_in_schema=False)
    async def generate(http: Request, endpoint: str):
        endpoint = endpoint.strip("/")
        try:
            check_endpoint(endpoint, http.method)
            schema, kind = GENERATE[endpoint]
            body = schema.model_validate_json(await http.body())
            body.model = find_name(body.model, names)
            # loading a model and encoding prompts would block the event loop
            model_engine = await run_in_threadpool(engine, body.model)
            metrics.engines[body.model] = model_engine
            client = http.client.host if http.client else None
            completion = await run_in_threadpool(kind, model_engine, body, turns, client)
            response = await respond(http, completion)
        except Exception as error:
            response = error_answer(error)
        label = endpoint if endpoint in GENERATE else "other"
        metrics.REQUESTS.labels(label, response.status_code).inc()
        return response

    return router


def find_name(name: str, names: list[str]) -> str:
    """The name as it stands in `names`: "bundled" is short for the first bundled model."""
    if name == "bundled" and name not in names:
        name = f"bundled:{list_bundled()[0]}"
    if name not in names:
        raise RequestError(f"The model {name!r} does not exist: /v1/models lists the models.",
                           404, "model", "model_not_found")
    return name


def check_endpoint(endpoint: str, method: str):
    """Raises RequestError unless a POST to the endpoint generates text."""
    if endpoint not in GENERATE and not endpoint.startswith("models"):
        raise RequestError(f"/v1/{endpoint} does not exist: use /v1/completions, "
                           "/v1/chat/completions or /v1/models.", 404)
    if endpoint not in GENERATE or method != "POST":
        raise RequestError(f"/v1/{endpoint} does not support {method}.", 405)


async def respond(http: Request, completion: Completion) -> StreamingResponse | JSONResponse:
    """The completion as a stream or as a whole, which ends early if the client disconnects."""
    if completion.body.stream:
        return StreamingResponse(completion.server_sent_events(), media_type="text/event-stream")
    whole = asyncio.create_task(completion.whole())
    try:
        while not whole.done() and not await http.is_disconnected():
            await asyncio.wait([whole], timeout=DISCONNECT_CHECK_S)
        return JSONResponse(whole.result() if whole.done() else {})
    finally:
        whole.cancel()


# --------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class ServeConfig(ModelConfig):
    """Serves a model under OpenAI's API."""

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: int = 8000
    access: tyro.conf.OmitArgPrefixes[Access] = dataclasses.field(default_factory=Access)


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
    engine, info = config.load()
    name = config.model or info["name"]
    app = FastAPI(title="GPT-2 From Scratch")
    app.include_router(routes([name], lambda _: engine))
    app.add_middleware(Guard, access=config.access, host=config.host)
    backend = f"{engine.dtype} on {engine.device}, {engine.forward.backend}"
    print(f"{name}: {describe(info)}; {backend}")
    print(f"Serving at http://{config.host}:{config.port}/v1; press Ctrl-C to stop", flush=True)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning",
                timeout_graceful_shutdown=GRACE_S)


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(ServeConfig))
