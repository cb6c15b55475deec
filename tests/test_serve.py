import asyncio
import concurrent.futures
import gc
import socket
import threading
import time

import openai
import pytest
import requests
import uvicorn
from conftest import tiny_gpt
from fastapi import FastAPI

import app
import serve
from engine.scheduler import Token
from generate import Engine
from tokenizer import CharTokenizer, load_tokenizer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def engines():
    chars = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")
    gpt2 = load_tokenizer("gpt2")
    return {
        "char": Engine(tiny_gpt(vocab_size=32, block_size=64), chars),
        "gpt2": Engine(tiny_gpt(vocab_size=50304, block_size=64), gpt2),
        "crowded": Engine(tiny_gpt(vocab_size=32), chars, max_running=1, max_waiting=1),
    }


@pytest.fixture(scope="module")
def url(engines):
    """The API on loopback, for three models."""
    application, port = FastAPI(), free_port()
    application.include_router(serve.routes(list(engines), engines.__getitem__))
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def wait_until_idle(engine: Engine):
    """Waits until the engine generates nothing; fails after 20 seconds."""
    deadline = time.monotonic() + 20
    while engine.scheduler.load() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.scheduler.load() == (0, 0)


# --------------------------------------------------------------------------------------------------
# Completions

def test_a_client_gets_what_the_engine_generates(client, engines):
    completion = client.completions.create(
        model="char", prompt="the fox ", max_tokens=30, temperature=0.9, top_p=0.95, seed=7, n=2)
    expected = engines["char"].generate(
        "the fox ", n=2, max_new_tokens=30, temperature=0.9, top_p=0.95, seed=7)
    assert [choice.text for choice in completion.choices] == expected
    assert [choice.finish_reason for choice in completion.choices] == ["length"] * 2
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 60, 68)


def test_the_parts_of_a_stream_join_to_the_same_text(client):
    options = {"model": "gpt2", "prompt": "Hello", "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**options)
    stream = client.completions.create(
        **options, stream=True, stream_options={"include_usage": True})
    texts, reasons, parts, usage = ["", ""], [None, None], 0, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length", "length"]
    assert parts >= 60 and usage.completion_tokens == 60


def test_logprobs_and_echo_agree_with_inspect(client, engines):
    completion = client.completions.create(
        model="gpt2", prompt="The fox went", max_tokens=5, seed=1, logprobs=3, echo=True)
    choice, logprobs = completion.choices[0], completion.choices[0].logprobs

    # the same text from the engine
    engine = engines["gpt2"]
    ids = engine.tokenizer.encode("The fox went")
    events = [event for _, event in engine.submit(ids, max_new_tokens=5, seed=1, logprobs=0)]
    new_ids = [event.id for event in events if isinstance(event, Token)]
    expected = [token["logprob"] for token in engine.inspect(ids + new_ids)]

    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(expected[1:], abs=1e-3)
    assert choice.text.startswith("The fox went")
    assert logprobs.tokens[:3] == ["The", " fox", " went"]
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert logprobs.text_offset[:4] == [0, 3, 7, 12]
    for top in logprobs.top_logprobs[1:]:
        assert 3 <= len(top) <= 4 and max(top.values()) <= 0

    # max_tokens=0 scores the prompt
    scored = client.completions.create(
        model="gpt2", prompt="The fox went", max_tokens=0, logprobs=0, echo=True).choices[0]
    assert scored.text == "The fox went"
    assert scored.logprobs.token_logprobs == logprobs.token_logprobs[:3]


def test_stop_strings_end_a_text_before_them(client):
    options = {"model": "char", "prompt": "abc", "max_tokens": 40, "seed": 5}
    full = client.completions.create(**options).choices[0].text
    stop = full[10:13]
    choice = client.completions.create(**options, stop=["#", stop]).choices[0]
    assert choice.text == full[:full.find(stop)] and choice.finish_reason == "stop"
    chunks = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_several_prompts_and_prompts_of_ids(client):
    options = {"model": "char", "max_tokens": 6, "seed": 2, "n": 2}
    of_text = client.completions.create(prompt=["ab", "the "], **options)
    of_ids = client.completions.create(prompt=[[4, 5], [23, 11, 8, 1]], **options)
    assert [choice.index for choice in of_text.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in of_text.choices] == [choice.text for choice in of_ids.choices]


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["char", "gpt2", "crowded"]
    assert client.models.retrieve("gpt2").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt5")


# --------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize("change, param", [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 100}, "logprobs"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"extra_body": {"tempreature": 1}}, "tempreature"),
    ({"prompt": [99]}, None),
    ({"n": 100}, None),
    ({"stop": [""]}, None),
    ({"prompt": {"a": 1}}, "prompt"),
])
def test_bad_requests_get_errors_in_openais_format(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "char", "prompt": "abc", **change})
    assert caught.value.type == "invalid_request_error" and caught.value.param == param
    assert caught.value.body["message"]


def test_invalid_json_and_unknown_models_are_errors_too(client, url):
    answer = requests.post(f"{url}/completions", data="not json", timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt5", prompt="abc")
    assert caught.value.code == "model_not_found"


def test_a_full_server_is_busy_and_names_the_position_in_the_queue(client, engines):
    running = [engines["crowded"].submit("abc", max_new_tokens=100_000) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="number 2 in the queue") as caught:
        client.completions.create(model="crowded", prompt="abc")
    assert caught.value.code == "busy"
    for request in running:
        request.cancel()


# --------------------------------------------------------------------------------------------------
# Clients that leave, and many clients

def test_a_client_that_disconnects_from_a_stream_ends_its_text(client, engines):
    stream = client.completions.create(
        model="char", prompt="abc", max_tokens=100_000, stream=True)
    next(iter(stream))
    assert engines["char"].scheduler.load() == (1, 0)
    stream.close()
    wait_until_idle(engines["char"])


def test_a_client_that_disconnects_before_the_whole_text_ends_it(engines, url):
    body = {"model": "char", "prompt": "abc", "max_tokens": 100_000}
    with pytest.raises(requests.Timeout):
        requests.post(f"{url}/completions", json=body, timeout=1)
    wait_until_idle(engines["char"])


def test_a_stream_that_is_never_read_ends_its_text(engines):
    body = serve.CompletionRequest(model="char", prompt="abc", max_tokens=100_000, stream=True)
    events = serve.Completion(engines["char"], body).server_sent_events()
    assert sum(engines["char"].scheduler.load()) == 1
    del events
    gc.collect()
    wait_until_idle(engines["char"])


def test_a_text_that_has_ended_is_answered_without_another_wait(engines, monkeypatch):
    def no_wait(*_):
        raise AssertionError("waited although all texts have ended")

    async def answer():
        body = serve.CompletionRequest(model="char", prompt="abc", max_tokens=5, seed=1)
        completion = serve.Completion(engines["char"], body)
        wait_until_idle(engines["char"])
        monkeypatch.setattr(asyncio, "wait_for", no_wait)
        return await completion.whole(is_disconnected=None)

    assert len(asyncio.run(answer())["choices"][0]["text"]) == 5


def test_many_clients_get_the_texts_that_each_would_get_alone(client):
    def write(seed):
        completion = client.completions.create(
            model="char", prompt="the ", max_tokens=40, seed=seed)
        return completion.choices[0].text

    alone = [write(seed) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(write, range(12))) == alone


def test_the_page_serves_the_api_too():
    port = free_port()
    config = app.AppConfig(model="bundled:shakespeare", port=port)
    page = app.main(config, prevent_thread_lock=True, quiet=True)
    try:
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = next(iter(client.models.list())).id
        completion = client.completions.create(model=name, prompt="ROMEO:", max_tokens=20)
        assert len(completion.choices[0].text) == 20
        assert "gradio" in requests.get(f"{url}/", timeout=10).text
    finally:
        page.close()
