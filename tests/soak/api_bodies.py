"""The bodies of the API's requests that the fuzzer tries: BODIES, a table at the end.

See tokenizer_files.py for how such a table works.
"""
import json

from mutations import DEEP, damaged_json
from pydantic import ValidationError
from small import VALID

import generate
from api import schema
from common.errors import UserError

COMMON = {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 2,
          "repetition_penalty": 1.1, "stop": ["a", "b"], "seed": 1, "stream": True,
          "stream_options": {"include_usage": True}, "min_p": 0, "user": "u"}
MESSAGE = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
REQUESTS = [
    (schema.CompletionRequest, {**COMMON, "prompt": "hello", "logprobs": 2, "echo": True}),
    (schema.CompletionRequest, {"model": "m", "prompt": [[1, 2], [3]]}),
    (schema.CompletionRequest, {"model": "m", "prompt": "hello"}),
    (schema.ChatRequest, {**COMMON, "messages": [MESSAGE], "logprobs": True}),
    (schema.ChatRequest, {"model": "m", "messages": [MESSAGE]})]


def api_body(_patch):
    bodies = [(kind, document, json.dumps(document).encode()) for kind, document in REQUESTS]

    def attempt(source):
        kind, document, content = source.choice(bodies)
        return read_body(kind, damaged_json(content, document, source, (DEEP, MESSAGE, [MESSAGE])))
    return attempt


def read_body(kind: type[schema.GenerationRequest], content: bytes) -> str:
    """Reads a body as serve.py does."""
    try:
        request = kind.model_validate_json(content)
        generate.Sampling(**request.sampling())
        if kind is schema.ChatRequest:
            for message in request.messages:
                message.plain()
        else:
            request.prompts()
        return VALID
    except (UserError, ValidationError) as error:
        assert schema.error_answer(error).status_code == 400
        return "one sentence"


BODIES = {"a body of the API": api_body}
