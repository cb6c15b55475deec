"""The bodies of requests to the API, and its errors in OpenAI's format.

Fields that ask for nothing are accepted: null ones, those that never change a text, and unsupported
ones at their neutral value. Any other unknown field is an error.
"""
import logging
import traceback
from typing import Literal

import pydantic
from fastapi.responses import JSONResponse

from common.errors import UserError
from engine.scheduler import Busy

MAX_PROMPTS = 128  # in one request
MAX_N = 128  # texts of a prompt, as OpenAI documents; an engine may allow fewer
MAX_NEW_TOKENS = 100_000  # in one request, over all texts
RETRY_AFTER_S = 5  # the clients of a busy server should wait this long

# fields that never change a text
IGNORED = {"metadata", "name", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
           "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
# fields that are not supported -> the values at which they ask for nothing
NEUTRAL = {
    "annotations": ([],), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,),
    "function_call": ("none", "auto"), "functions": ([],), "ignore_eos": (False,),
    "logit_bias": ({},), "min_p": (0,), "min_tokens": (0,), "modalities": (["text"],),
    "presence_penalty": (0,), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "suffix": ("",), "tool_calls": ([],),
    "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",),
}


# --------------------------------------------------------------------------------------------------
# Bodies

class Body(pydantic.BaseModel, extra="forbid"):
    @pydantic.model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, body):
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items()
                if value is not None and name not in IGNORED
                and value not in NEUTRAL.get(name, ())}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; there is none here


class GenerationRequest(Body):
    """What both kinds of request share. top_k and repetition_penalty are vLLM's extensions."""
    model: str
    max_tokens: int | None = pydantic.Field(None, ge=0, le=MAX_NEW_TOKENS)
    temperature: float = pydantic.Field(1.0, ge=0, le=2)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=-1)  # 0 and -1 turn it off
    repetition_penalty: float = pydantic.Field(1.0, gt=0)
    n: int = pydantic.Field(1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | list[str] = []
    seed: int | None = pydantic.Field(None, ge=-2**63, lt=2**63)

    def sampling(self) -> dict:
        """The options for `Engine.submit`, without logprobs."""
        return {
            "max_new_tokens": 16 if self.max_tokens is None else self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k if self.top_k > 0 else None,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "seed": self.seed,
        }


class CompletionRequest(GenerationRequest):
    """https://platform.openai.com/docs/api-reference/completions/create"""
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    truncate_prompt_tokens: int | None = pydantic.Field(None, ge=-1)  # vLLM's; -1: the context
    logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """The prompt or prompts, as a list."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    type: Literal["text"] = "text"  # lm-eval sends it with each message

    def plain(self) -> dict[str, str]:
        """The message as the templates read it; "developer" is a newer name for "system"."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(GenerationRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""
    messages: list[Message]
    max_completion_tokens: int | None = pydantic.Field(None, ge=0, le=MAX_NEW_TOKENS)
    logprobs: bool = False
    top_logprobs: int = pydantic.Field(0, ge=0, le=20)

    def length(self, default: int) -> int:
        """The most tokens of a reply."""
        lengths = (self.max_completion_tokens, self.max_tokens, default)
        return next(length for length in lengths if length is not None)


# --------------------------------------------------------------------------------------------------
# Errors

class RequestError(UserError):
    """A UserError with its HTTP status, and OpenAI's `param` and `code`."""

    def __init__(self, message: str, status: int = 400, param: str | None = None,
                 code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class ContextExceeded(RequestError):
    """The prompt is longer than the model's context."""

    def __init__(self, message: str):
        super().__init__(message, code="context_length_exceeded")


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
               429: "rate_limit_error", 500: "server_error"}


def to_request_error(error: Exception) -> RequestError:
    """The error as a RequestError. It never quotes the request's texts."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Busy):
        return RequestError(str(error), 429, code="busy")
    if isinstance(error, UserError):
        return RequestError(str(error))
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        if not first["loc"]:
            return RequestError(f"The body must be a JSON object ({first['msg']}).")
        param = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            name = first["loc"][-1]
            return RequestError(f"{name} is not supported: leave it out.", param=param)
        return RequestError(f"{param}: {first['msg']}.", param=param)
    # a bug: log where it happened, without the message, which may quote the request
    place = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger("uvicorn.error").error("%s\n%s", type(error).__name__, place)
    return RequestError(f"The server failed with {type(error).__name__}.", 500)


def error_body(error: Exception) -> dict:
    """An error in OpenAI's format."""
    error = to_request_error(error)
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param,
                      "code": error.code}}


def error_answer(error: Exception) -> JSONResponse:
    error = to_request_error(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 429 else None
    return JSONResponse(error_body(error), error.status, headers)
