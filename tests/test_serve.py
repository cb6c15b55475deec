import concurrent.futures
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
    return {"char": Engine(tiny_gpt(vocab_size=32, block_size=64), chars),
            "gpt2": Engine(tiny_gpt(vocab_size=50304, block_size=64), load_tokenizer("gpt2")),
            "crowded": Engine(tiny_gpt(vocab_size=32), chars, max_running=1, max_waiting=1)}


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


def test_the_client_gets_what_the_engine_writes(client, engines):
    done = client.completions.create(model="char", prompt="the fox ", max_tokens=30, temperature=0.9, top_p=0.95, seed=7, n=2)
    expected = engines["char"].generate("the fox ", n=2, max_new_tokens=30, temperature=0.9, top_p=0.95, seed=7)
    assert [choice.text for choice in done.choices] == expected
    assert [choice.finish_reason for choice in done.choices] == ["length"] * 2
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (8, 60, 68)


def test_a_stream_joins_to_the_same_text(client):
    options = {"model": "gpt2", "prompt": "Hello", "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**options)
    texts, reasons, chunks, usage = ["", ""], [None, None], 0, None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices] and reasons == ["length", "length"]
    assert chunks >= 60 and usage.completion_tokens == 60


def test_logprobs_and_echo_agree_with_inspect(client, engines):
    done = client.completions.create(model="gpt2", prompt="The fox went", max_tokens=5, seed=1, logprobs=3, echo=True)
    choice, logprobs = done.choices[0], done.choices[0].logprobs
    ids = engines["gpt2"].tokenizer.encode("The fox went")
    events = [event for _, event in engines["gpt2"].submit(ids, max_new_tokens=5, seed=1, logprobs=0)]
    known = engines["gpt2"].inspect(ids + [event.id for event in events if isinstance(event, Token)])
    assert logprobs.token_logprobs[1:] == pytest.approx([token["logprob"] for token in known[1:]], abs=1e-3)
    assert choice.text.startswith("The fox went") and logprobs.tokens[:3] == ["The", " fox", " went"]
    assert logprobs.token_logprobs[0] is None and len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert logprobs.text_offset[:4] == [0, 3, 7, 12]
    assert all(3 <= len(top) <= 4 and max(top.values()) <= 0 for top in logprobs.top_logprobs[1:])
    scored = client.completions.create(model="gpt2", prompt="The fox went", max_tokens=0, logprobs=0, echo=True).choices[0]
    assert scored.text == "The fox went" and scored.logprobs.token_logprobs == logprobs.token_logprobs[:3]


def test_stop_strings_end_a_text_before_them(client):
    free = client.completions.create(model="char", prompt="abc", max_tokens=40, seed=5).choices[0].text
    stop = free[10:13]
    choice = client.completions.create(model="char", prompt="abc", max_tokens=40, seed=5, stop=["#", stop]).choices[0]
    assert choice.text == free[:free.find(stop)] and choice.finish_reason == "stop"
    pieces = client.completions.create(model="char", prompt="abc", max_tokens=40, seed=5, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text


def test_several_prompts_and_prompts_of_ids(client):
    done = client.completions.create(model="char", prompt=["ab", "the "], max_tokens=6, seed=2, n=2)
    alone = client.completions.create(model="char", prompt=[[4, 5], [23, 11, 8, 1]], max_tokens=6, seed=2, n=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in done.choices] == [choice.text for choice in alone.choices]


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["char", "gpt2", "crowded"]
    assert client.models.retrieve("gpt2").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt5")


@pytest.mark.parametrize("change, param", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"),
    ({"max_tokens": -1}, "max_tokens"), ({"logprobs": 100}, "logprobs"), ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"extra_body": {"tempreature": 1}}, "tempreature"), ({"prompt": [99]}, None), ({"n": 100}, None), ({"stop": [""]}, None),
    ({"prompt": {"a": 1}}, "prompt")])
def test_bad_requests_get_errors_of_openais_shape(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "char", "prompt": "abc", **change})
    assert caught.value.type == "invalid_request_error" and caught.value.param == param and caught.value.body["message"]


def test_no_json_and_no_such_model_are_errors_too(client, url):
    answer = requests.post(f"{url}/completions", data="not json", timeout=10)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt5", prompt="abc")
    assert caught.value.code == "model_not_found"


def test_a_full_server_says_busy_with_the_place_in_the_queue(client, engines):
    requests = [engines["crowded"].submit("abc", max_new_tokens=100_000) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="number 2 in the queue") as caught:
        client.completions.create(model="crowded", prompt="abc")
    assert caught.value.code == "busy"
    for request in requests:
        request.cancel()


def test_who_hangs_up_frees_the_place(client, engines):
    stream = client.completions.create(model="char", prompt="abc", max_tokens=100_000, stream=True)
    next(iter(stream))
    assert engines["char"].scheduler.running
    stream.close()
    deadline = time.monotonic() + 20
    while engines["char"].scheduler.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engines["char"].scheduler.running


def test_a_crowd_is_served_together(client):
    def write(seed):
        return client.completions.create(model="char", prompt="the ", max_tokens=40, seed=seed).choices[0].text
    alone = [write(seed) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(write, range(12))) == alone


def test_the_page_serves_it_too():
    port = free_port()
    page = app.main(app.AppConfig(model="bundled:shakespeare", port=port), prevent_thread_lock=True, quiet=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        name = next(iter(client.models.list())).id
        assert len(client.completions.create(model=name, prompt="ROMEO:", max_tokens=20).choices[0].text) == 20
        assert "gradio" in requests.get(f"http://127.0.0.1:{port}/", timeout=10).text
    finally:
        page.close()
