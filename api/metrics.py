"""What /metrics shows, in Prometheus' format: counts and times, never texts."""
import weakref

import prometheus_client
from fastapi import Response
from prometheus_client import Counter, Gauge, Histogram

from generate import Engine

REQUESTS = Counter("gpt2_requests", "Requests answered", ["endpoint", "status"])
PROMPT_TOKENS = Counter("gpt2_prompt_tokens", "Tokens of prompts", ["model"])
GENERATED_TOKENS = Counter("gpt2_generated_tokens", "Tokens generated", ["model"])
TIME_TO_FIRST_TOKEN = Histogram(
    "gpt2_time_to_first_token_seconds", "From the request to its first token", ["model"])
RUNNING = Gauge("gpt2_running_texts", "Texts being generated", ["model"])
WAITING = Gauge("gpt2_waiting_requests", "Requests in the queue", ["model"])

engines: dict[str, Engine] = weakref.WeakValueDictionary()  # in use, by the model's name


def render() -> Response:
    """The response of /metrics."""
    for gauge in RUNNING, WAITING:
        gauge.clear()
    for name, engine in list(engines.items()):
        running, waiting = engine.scheduler.load()
        RUNNING.labels(name).set(running)
        WAITING.labels(name).set(waiting)
    return Response(prometheus_client.generate_latest(),
                    media_type=prometheus_client.CONTENT_TYPE_LATEST)
