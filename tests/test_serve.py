import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import openai
import pytest
import requests
import torch
import uvicorn
from conftest import ROOT, free_port, running_page, tiny_gpt, wait_until
from fastapi import FastAPI

import serve
from api import completions, guard, schema
from api.conversation import SPEAKERS, chat_ids, transcript
from api.guard import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, Access, Guard
from api.schema import MAX_PROMPTS, CompletionRequest
from common.errors import UserError
from engine.scheduler import Token
from generate import Engine
from tokenizer import CharTokenizer, load_tokenizer

CHARS = CharTokenizer("\n ,.:STabcdefghijklmnopqrstuvwxyz")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def engines():
    chars = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")
    gpt2 = load_tokenizer("gpt2")
    chat = copy.copy(gpt2)
    chat.chat_template = CHAT_TEMPLATE
    return {
        "char": Engine(tiny_gpt(vocab_size=32, block_size=64), chars),
        "gpt2": Engine(tiny_gpt(vocab_size=50304, block_size=64), gpt2),
        "chat": Engine(tiny_gpt(vocab_size=50304, block_size=64), chat),
        "base": Engine(tiny_gpt(vocab_size=33, block_size=200), CHARS),
        "ends": Engine(tiny_gpt_that_predicts(gpt2.eot), gpt2),
        "fox": Engine(tiny_gpt_that_predicts(*gpt2.encode("🦊")), gpt2),
        "crowded": Engine(tiny_gpt(vocab_size=32), chars, max_running=1, max_waiting=1),
        "bundled:stories": Engine(tiny_gpt(vocab_size=32), chars),
    }


def tiny_gpt_that_predicts(*ids):
    """A model that always predicts these ids, the likeliest first, and hardly ever others."""
    model = tiny_gpt(vocab_size=50304, block_size=64)
    weights = model.transformer
    with torch.no_grad():
        weights.ln_f.weight.zero_()
        weights.ln_f.bias.fill_(1.0)
        weights.wte.weight[:, :] = 0.0
        for i, token in enumerate(ids):
            weights.wte.weight[token] = 1.0 - 0.05 * i
    return model


@contextlib.contextmanager
def serving(engines, access=None, root_path=""):
    """Serves the API on loopback behind the guard; yields its address."""
    application, port = FastAPI(), free_port()
    application.root_path = root_path  # as Gradio sets it
    application.include_router(serve.routes(list(engines), engines.__getitem__))
    application.add_middleware(Guard, access=access or Access(), host="127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(engines):
    with serving(engines) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def post(address: str, body, **headers) -> requests.Response:
    """Posts a body, as JSON unless it is text already."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json", **headers}
    return requests.post(address, data=text, headers=headers, timeout=20)


def wait_until_idle(engine: Engine):
    """Waits until the engine generates nothing."""
    wait_until(lambda: engine.scheduler.load() == (0, 0), seconds=20)


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
    assert parts > 40 and usage.completion_tokens == 60


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


def test_several_prompts_get_the_texts_of_their_ids(client):
    options = {"model": "char", "max_tokens": 6, "seed": 2, "n": 2}
    of_text = client.completions.create(prompt=["ab", "the "], **options)
    of_ids = client.completions.create(prompt=[[4, 5], [23, 11, 8, 1]], **options)
    assert [choice.index for choice in of_text.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in of_text.choices] == [choice.text for choice in of_ids.choices]


def test_offsets_point_into_the_text_in_a_stream_too(client, engines):
    # characters of several tokens, and a stop string that is held back twice before it occurs
    options = {"model": "gpt2", "prompt": "Ünïcödé 🦊 fox", "max_tokens": 40, "logprobs": 0,
               "temperature": 2, "echo": True, "seed": 2}
    text = client.completions.create(**options).choices[0].text
    options["stop"] = text[-6:]
    whole = client.completions.create(**options).choices[0]
    offsets, parts = [], ""
    for chunk in client.completions.create(**options, stream=True):
        offsets += chunk.choices[0].logprobs.text_offset
        parts += chunk.choices[0].text
    assert parts == whole.text and offsets == whole.logprobs.text_offset

    # the prompt's and the continuation's bytes are decoded separately
    tokenizer = engines["gpt2"].tokenizer
    prompt = tokenizer.encode(options["prompt"])
    decode, offset = tokenizer.stream_decoder(), 0
    for number, i in enumerate(prompt):
        assert offsets[number] == offset
        offset += len(decode([i]))
    assert offset == len(options["prompt"]) == offsets[len(prompt)]
    for token, start in zip(whole.logprobs.tokens, offsets):
        if not token.startswith("bytes:") and start + len(token) <= len(whole.text):
            assert whole.text[start:start + len(token)] == token


def test_each_part_of_a_character_has_its_own_logprob(client):
    options = {"model": "fox", "max_tokens": 2, "temperature": 0}
    logprobs = client.completions.create(
        prompt="🦊", logprobs=3, echo=True, **options).choices[0].logprobs
    parts = [r"bytes:\xf0\x9f", r"bytes:\xa6", r"bytes:\x8a"]
    assert logprobs.tokens == parts + [parts[0]] * 2
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        if logprob is not None:
            assert list(top) == parts and top[token] == logprob
            # as lm-eval tells whether a token is the likeliest
            assert (token == max(top, key=top.get)) == (token == parts[0])

    chat = client.chat.completions.create(
        messages=HISTORY[1:2], logprobs=True, top_logprobs=3, **options).choices[0].logprobs
    for token in chat.content:
        assert [part.token for part in token.top_logprobs] == [
            name.removeprefix("bytes:") for name in parts]
        assert b"".join(bytes(part.bytes) for part in token.top_logprobs) == "🦊".encode()


def test_the_end_of_a_text_has_a_logprob_and_no_text(client):
    options = {"model": "ends", "prompt": "Hello", "max_tokens": 5, "logprobs": 1}
    completion = client.completions.create(**options)
    choice = completion.choices[0]
    assert choice.text == "" and choice.finish_reason == "stop"
    assert choice.logprobs.tokens == ["<|endoftext|>"]
    assert choice.logprobs.token_logprobs[0] == max(choice.logprobs.top_logprobs[0].values())
    assert completion.usage.completion_tokens == 0
    # lm-eval drops the last entry, which must be the sampled one
    echo = client.completions.create(**options, echo=True).choices[0]
    assert echo.logprobs.tokens == ["Hello", "<|endoftext|>"] and echo.text == "Hello"
    chunks = list(client.completions.create(**options, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == [
        "<|endoftext|>"]


def test_a_prompt_longer_than_the_context_is_refused_unless_truncation_is_asked_for(
        client, engines):
    ids = list(range(100))
    for prompt in "a b " * 40, ids:
        with pytest.raises(openai.BadRequestError, match="context is 64 tokens") as caught:
            client.completions.create(model="gpt2", prompt=prompt)
        assert caught.value.code == "context_length_exceeded"
    options = {"model": "gpt2", "max_tokens": 9, "seed": 1, "echo": True, "logprobs": 0}
    for kept, truncation in (64, -1), (10, 10), (64, 99):
        cut = client.completions.create(
            prompt=ids, extra_body={"truncate_prompt_tokens": truncation}, **options)
        same = client.completions.create(prompt=ids[-kept:], **options)
        assert cut.choices == same.choices and cut.usage == same.usage


def test_text_that_cannot_fit_into_the_context_is_not_encoded(client, engines, monkeypatch):
    engine, encoded = engines["gpt2"], []  # lengths of texts
    encode = engine.tokenizer.encode
    text = "The fox's den, 12 miles away!\n\n" * 60_000
    ids = encode(text[-10_000:])[-64:]
    monkeypatch.setattr(engine.tokenizer, "encode",
                        lambda text: encoded.append(len(text)) or encode(text))
    with pytest.raises(openai.BadRequestError, match="has 1,860,000 characters") as caught:
        client.completions.create(model="gpt2", prompt=text)
    assert caught.value.code == "context_length_exceeded"
    options = {"model": "gpt2", "max_tokens": 1, "seed": 1, "echo": True, "logprobs": 0}
    cut = client.completions.create(prompt=text, extra_body={"truncate_prompt_tokens": -1},
                                    **options)
    assert cut.choices == client.completions.create(prompt=ids, **options).choices
    assert max(encoded) <= 2 * engine.max_chars < 20_000


@pytest.mark.parametrize("model", ["base", "chat"])
def test_messages_that_cannot_fit_into_the_context_are_not_encoded(
        client, engines, model, monkeypatch):
    tokenizer, encoded = engines[model].tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode",
                        lambda text: encoded.append(len(text)) or encode(text))
    long = {"role": "user", "content": "a b " * 100_000}
    with pytest.raises(openai.BadRequestError, match="too long"):
        client.chat.completions.create(model=model, messages=[long])
    messages = [long, *HISTORY[2:]] + 5_000 * [{"role": "user", "content": ""}] + HISTORY[1:]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=1)
    assert chat.left_out > 4_900
    assert max(encoded) < 20 * engines[model].max_chars


def test_more_prompts_than_allowed_are_not_encoded(engines, monkeypatch):
    encoded = []
    monkeypatch.setattr(engines["char"].tokenizer, "encode", encoded.append)
    body = CompletionRequest(model="char", prompt=["a"] * 1000)
    with pytest.raises(UserError, match="1,000 prompts"):
        completions.Completion(engines["char"], body, completions.Turns())
    assert not encoded


def test_an_echo_shows_the_text_of_the_tokens_that_the_model_read(client):
    options = {"model": "char", "prompt": "fЖox", "max_tokens": 0, "logprobs": 0, "echo": True}
    choice = client.completions.create(**options).choices[0]
    assert choice.text == "f ox" == "".join(choice.logprobs.tokens)


def test_more_texts_than_places_are_the_texts_that_each_would_be_alone(client):
    options = {"model": "char", "max_tokens": 5, "seed": 3}
    prompts = ["abcdefghijklmnopqrstuvwxyz"[i % 26:] for i in range(80)]
    choices = client.completions.create(prompt=prompts, n=2, **options).choices
    for i in 0, 41, 79:
        alone = client.completions.create(prompt=prompts[i], n=2, **options).choices
        assert [choice.text for choice in choices[2 * i:2 * i + 2]] == [
            choice.text for choice in alone]


def test_bundled_is_short_for_the_first_bundled_model(client):
    assert client.models.retrieve("bundled").id == "bundled:stories"
    completion = client.completions.create(model="bundled", prompt="a", max_tokens=1)
    assert completion.choices and completion.model == "bundled:stories"


@pytest.mark.parametrize("fields", [
    {"top_k": 0}, {"top_k": -1}, {"min_p": 0}, {"store": True}, {"metadata": {"a": "b"}},
    {"service_tier": "auto"}, {"logit_bias": {}}, {"presence_penalty": 0.0}, {"best_of": 1},
    {"suffix": None, "temperature": None, "n": None, "max_tokens": None, "unheard_of": None},
    {"stream_options": {"include_obfuscation": False}}, {"user": "me"}])
def test_fields_that_ask_for_nothing_change_nothing(client, fields):
    options = {"model": "char", "prompt": "abc", "seed": 1}
    plain = client.completions.create(**options).choices
    assert client.completions.create(**options, extra_body=fields).choices == plain


def test_a_text_that_ran_out_of_time_says_so(engines):
    engine = Engine(engines["char"].model, engines["char"].tokenizer, deadline_s=0.1)
    body = CompletionRequest(model="char", prompt="abc", max_tokens=50_000, n=2)
    answer = asyncio.run(completions.Completion(engine, body, completions.Turns()).whole())
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["deadline"] * 2


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()][:2] == ["char", "gpt2"]
    assert client.models.retrieve("gpt2").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt5")


# --------------------------------------------------------------------------------------------------
# Chat completions

HISTORY = [
    {"role": "system", "content": "two friends talk."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "how are you"},
]


def test_a_base_model_continues_a_transcript(client, engines):
    options = {"model": "base", "temperature": 0.9, "top_p": 0.9, "seed": 5}
    chat = client.chat.completions.create(messages=HISTORY, max_tokens=60, n=2, **options)
    prompt = ("two friends talk.\n\nStudent:\nhello\n\nTeacher:\ngood day\n\n"
              "Student:\nhow are you\n\nTeacher:\n")
    expected = engines["base"].generate(
        prompt, n=2, max_new_tokens=60, temperature=0.9, top_p=0.9, seed=5,
        stop=("\n\nStudent:", "\nStudent:", "\n\nTeacher:", "\nTeacher:"))
    assert [choice.message.content for choice in chat.choices] == [
        text.lstrip() for text in expected]
    assert chat.choices[0].message.role == "assistant" and chat.object == "chat.completion"
    assert chat.usage.prompt_tokens == len(prompt) and chat.left_out == 0


def test_a_model_with_a_template_gets_its_own_format(client, engines):
    parts = [{"type": "text", "text": "how are "}, {"type": "text", "text": "you"}]
    messages = [{**HISTORY[0], "role": "developer"}, *HISTORY[1:3],
                {"role": "user", "content": parts, "name": "ann", "type": "text"}]
    chat = client.chat.completions.create(
        model="chat", messages=messages, max_completion_tokens=20, max_tokens=3, seed=1)
    ids = chat_ids(engines["chat"].tokenizer, HISTORY)
    assert chat.choices[0].message.content == engines["chat"].generate(
        ids, max_new_tokens=20, seed=1)[0].lstrip()
    assert chat.usage.prompt_tokens == len(ids) and chat.usage.completion_tokens == 20


def test_fields_that_ask_for_nothing_change_no_chat(client):
    options = {"model": "chat", "messages": HISTORY, "max_tokens": 5, "seed": 1}
    plain = client.chat.completions.create(**options).choices
    for fields in (
            {"tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {"echo": False},
            {"function_call": "none", "functions": []}, {"response_format": {"type": "text"}},
            {"reasoning_effort": "none"}, {"verbosity": "medium"}, {"top_logprobs": 0},
            {"prompt_cache_retention": "24h", "stop": None, "stream_options": None}):
        assert client.chat.completions.create(**options, extra_body=fields).choices == plain, fields


def test_the_parts_of_a_chat_join_to_the_whole_reply(client):
    options = {"model": "chat", "messages": HISTORY, "max_tokens": 25, "seed": 3, "n": 2,
               "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    texts, tokens, reasons, roles, usage = ["", ""], [[], []], [None] * 2, [], None
    for chunk in client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk" and chunk.left_out == 0
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert roles == ["assistant"] * 2 and reasons == ["length"] * 2
    assert usage == whole.usage and usage.completion_tokens == 50
    for token in tokens[0]:
        assert token.bytes == list(token.token.encode()) and len(token.top_logprobs) == 2


def test_stop_strings_of_a_chat_come_before_the_template(client):
    options = {"model": "base", "messages": HISTORY, "max_tokens": 60, "seed": 5}
    full = client.chat.completions.create(**options).choices[0].message.content
    choice = client.chat.completions.create(**options, stop=full[8:11]).choices[0]
    assert choice.message.content == full[:full.find(full[8:11])]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("model", ["base", "chat"])
def test_the_oldest_turns_leave_a_full_context_and_the_answer_says_so(client, engines, model):
    engine = engines[model]
    messages = [HISTORY[0], *HISTORY[1:3] * 12, HISTORY[3]]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=30, seed=2)
    assert 0 < chat.left_out < 24
    kept = [messages[0], *messages[1 + chat.left_out:]]
    same = client.chat.completions.create(model=model, messages=kept, max_tokens=30, seed=2)
    assert same.choices == chat.choices and same.left_out == 0
    # one turn more, or with a template one exchange more, does not fit
    more = [messages[0], *messages[chat.left_out - (model == "chat"):]]
    if model == "base":
        tokens = len(transcript(more, *SPEAKERS))
    else:
        assert kept[1]["role"] == "user"
        tokens = len(chat_ids(engine.tokenizer, more))
    assert tokens + 30 > engine.block_size

    with pytest.raises(openai.BadRequestError, match="too long") as caught:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "a b " * 100}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("change, param", [
    ({"messages": []}, "messages"),
    ({"messages": HISTORY[:1]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"top_logprobs": 2}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"extra_body": {"echo": True}}, "echo"),
])
def test_bad_chat_requests_name_the_parameter(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "base", "messages": HISTORY, **change})
    assert caught.value.param == param and caught.value.body["message"]


def test_forty_streams_at_once_are_the_texts_that_each_would_be_alone(client, url):
    options = {"model": "base", "messages": HISTORY, "max_tokens": 15}

    async def stream(client, seed):
        parts = await client.chat.completions.create(**options, seed=seed, stream=True)
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as opened:
            return await asyncio.gather(*(stream(opened, seed) for seed in range(40)))

    texts = asyncio.run(all_at_once())
    assert len(set(texts)) > 30
    for seed in 0, 17, 39:
        single = client.chat.completions.create(**options, seed=seed)
        assert texts[seed] == single.choices[0].message.content


# --------------------------------------------------------------------------------------------------
# llm, a command line that can use any server with OpenAI's API

@pytest.mark.parametrize("whole", [(), ("--no-stream",)])
def test_llm_writes_and_chats(client, url, tmp_path, whole):
    pytest.importorskip("llm")
    models = [{"model_id": "writer", "model_name": "char", "api_base": url, "completion": True},
              {"model_id": "talker", "model_name": "base", "api_base": url}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML, too

    def ask(*arguments: str) -> str:
        options = "-o", "seed", "1", "-o", "max_tokens", "20", "-o", "temperature", "1", *whole
        return subprocess.run(
            [sys.executable, "-m", "llm", "prompt", *arguments, *options], check=True, text=True,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)}, stdout=subprocess.PIPE).stdout

    options = {"max_tokens": 20, "seed": 1}
    written = client.completions.create(model="char", prompt="abc", **options)
    assert ask("-m", "writer", "abc") == written.choices[0].text + "\n"
    said = client.chat.completions.create(model="base", messages=HISTORY[:2], **options)
    answer = ask("-m", "talker", "-s", HISTORY[0]["content"], HISTORY[1]["content"])
    assert answer == said.choices[0].message.content + "\n"


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
    ({"extra_body": {"n": 10**4299}}, "n"),
    ({"stop": [""]}, None),
    ({"stop": ["a"] * 9}, None),
    ({"stop": "a" * 101}, None),
    ({"seed": 2**64}, "seed"),
    ({"n": 8, "max_tokens": 50_000}, None),
    ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, None),
    ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ({"extra_body": {"stream_options": {"chunks": 2}}}, "stream_options"),
    ({"prompt": {"a": 1}}, "prompt"),
])
def test_bad_requests_get_errors_in_openais_format(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "char", "prompt": "abc", **change})
    assert caught.value.type == "invalid_request_error" and caught.value.param == param
    assert caught.value.body["message"]


def test_invalid_json_and_unknown_models_are_errors_too(client, url):
    answer = post(f"{url}/completions", "not json")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt5", prompt="abc")
    assert caught.value.code == "model_not_found"


def test_other_methods_and_paths_get_openais_errors(url):
    for method, path, status in (("GET", "completions", 405), ("PUT", "models", 405),
                                 ("DELETE", "models/char", 405), ("POST", "embeddings", 404),
                                 ("PATCH", "nothing", 404), ("OPTIONS", "models", 405),
                                 ("OPTIONS", "chat/completions", 405)):
        answer = requests.request(method, f"{url}/{path}", json={}, timeout=10)
        assert answer.status_code == status, path
        assert answer.json()["error"]["message"].startswith(f"/v1/{path} does not")


def test_slashes_too_many_and_head_requests_are_answered(url):
    root = url.removesuffix("/v1")
    for path in f"{url}/completions/", f"{url}//completions":
        assert post(path, BODY).json()["choices"]
    assert requests.get(f"{url}/models/", timeout=10).json()["data"]
    for path, status in (f"{root}/health", 200), (f"{url}/models", 200), (f"{url}/nothing", 404):
        answer = requests.head(path, timeout=10)
        assert (answer.status_code, answer.content) == (status, b"")


@pytest.mark.parametrize("body", [
    "[" * 100_000, '{"a":' * 50_000, "[]", "7", b'{"prompt": "\xff"}',
    r'{"model": "char", "prompt": "\ud800", "echo": true}',
    r'{"model": "\udfff", "prompt": "a"}', '{"model": "char", "temperature": NaN}'])
def test_hostile_bodies_are_bad_requests(url, body):
    answer = post(f"{url}/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_bug_is_an_error_in_openais_format_and_its_log_holds_no_prompt(caplog):
    with caplog.at_level("ERROR"):
        answer = schema.error_answer(ValueError("secret prompt"))
    assert answer.status_code == 500 and b"secret" not in answer.body
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_a_full_server_is_busy_and_names_the_position_in_the_queue(client, engines):
    running = [engines["crowded"].submit("abc", max_new_tokens=100_000) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="number 2 in the queue") as caught:
        client.completions.create(model="crowded", prompt="abc")
    assert caught.value.code == "busy"
    assert int(caught.value.response.headers["Retry-After"]) > 0
    for request in running:
        request.cancel()


# --------------------------------------------------------------------------------------------------
# Clients that leave, and many clients

def test_a_client_that_disconnects_from_a_stream_ends_its_text(client, engines):
    stream = client.completions.create(
        model="char", prompt="abc", max_tokens=100_000, stream=True)
    assert next(event for event in stream if event.choices[0].text)  # it comes from a running text
    assert engines["char"].scheduler.load() == (1, 0)
    stream.close()
    wait_until_idle(engines["char"])


def test_a_client_that_disconnects_before_the_whole_text_ends_it(engines, url):
    body = {"model": "char", "prompt": "abc", "max_tokens": 100_000}
    with pytest.raises(requests.Timeout):
        requests.post(f"{url}/completions", json=body, timeout=1)
    wait_until_idle(engines["char"])


def test_a_stream_that_is_never_read_ends_its_text(engines):
    body = CompletionRequest(model="char", prompt="abc", max_tokens=100_000, stream=True)
    events = completions.Completion(engines["char"], body, completions.Turns()).server_sent_events()
    assert sum(engines["char"].scheduler.load()) == 1
    del events
    gc.collect()
    wait_until_idle(engines["char"])


def test_a_server_learns_between_two_events_of_a_stream_that_the_client_has_left(engines):
    """It learns this in the next turn of the event loop, and asyncio warns of a fifth write."""
    body = CompletionRequest(model="char", prompt="abc", max_tokens=3, n=8, stream=True)

    async def turns_of_the_loop() -> list[int]:
        """The turn in which each event of the stream is written."""
        turn = 0

        async def count():
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        completion = completions.Completion(engines["char"], body, completions.Turns())
        events = completion.server_sent_events()
        turns = [turn async for _ in events]
        counter.cancel()
        return turns

    turns = asyncio.run(turns_of_the_loop())
    assert len(turns) > 8 and len(set(turns)) == len(turns)


def test_a_text_that_has_ended_is_answered_without_another_wait(engines, monkeypatch):
    def no_wait(*_):
        raise AssertionError("waited although all texts have ended")

    async def answer():
        body = CompletionRequest(model="char", prompt="abc", max_tokens=5, seed=1)
        completion = completions.Completion(engines["char"], body, completions.Turns())
        wait_until_idle(engines["char"])
        monkeypatch.setattr(asyncio, "timeout", no_wait)
        return await completion.whole()

    assert len(asyncio.run(answer())["choices"][0]["text"]) == 5


def test_many_clients_get_the_texts_that_each_would_get_alone(client):
    def write(seed):
        completion = client.completions.create(
            model="char", prompt="the ", max_tokens=40, seed=seed)
        return completion.choices[0].text

    alone = [write(seed) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(write, range(12))) == alone


def test_prompts_that_are_scored_leave_threads_for_other_requests(url, engines, monkeypatch):
    released, inspect = threading.Event(), engines["char"].inspect
    monkeypatch.setattr(engines["char"], "inspect",
                        lambda *options: released.wait(30) and inspect(*options))
    body = {"model": "char", "prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
    with concurrent.futures.ThreadPoolExecutor(45) as pool:  # more than the server has threads
        scored = [pool.submit(post, f"{url}/completions", body) for _ in range(45)]
        wait_until(lambda: all(future.running() for future in scored))
        try:
            assert post(f"{url}/completions", BODY).status_code == 200
        finally:
            released.set()
        assert {future.result().status_code for future in scored} == {200}


def test_clients_take_turns_to_have_prompts_scored():
    scored = []

    async def score():
        turns = completions.Turns()
        clients = ["greedy"] * 20 + ["other"] * 2
        await asyncio.gather(*(turns.score(client, functools.partial(scored.append, client))
                               for client in clients))

    asyncio.run(score())
    assert len(scored) == 22
    assert scored.index("other") <= 2 * completions.SCORED


@pytest.mark.parametrize("penalty", [1e-308, 1e308])
def test_no_penalty_of_one_client_ends_the_text_of_another(client, engines, penalty):
    other = engines["char"].submit("abc", max_new_tokens=10**6)
    next(iter(other.events.get, None))
    choice = client.completions.create(model="char", prompt="abc", max_tokens=60, extra_body={
        "repetition_penalty": penalty}).choices[0]
    assert len(choice.text) == 60
    other.take_events()  # raises the error if the request failed
    assert engines["char"].scheduler.load()[0] == 1
    other.cancel()
    wait_until_idle(engines["char"])


def test_one_client_cannot_hold_all_places(url, engines):
    engine = engines["char"]
    greedy = [engine.submit("abc", 8, client="greedy", max_new_tokens=10**6) for _ in range(6)]
    wait_until(lambda: engine.scheduler.load()[0] >= 24)
    body = {"model": "char", "prompt": "abc", "max_tokens": 20, "seed": 1}
    answer = post(f"{url}/completions", body)
    assert answer.json()["usage"]["completion_tokens"] == 20
    assert engine.scheduler.load()[0] == 24, "some places stay free for clients that have none"
    for request in greedy:
        request.cancel()
    wait_until_idle(engine)


# --------------------------------------------------------------------------------------------------
# Health, metrics, the guard

def test_health_and_metrics_describe_the_server(client, url, engines):
    root = url.removesuffix("/v1")
    assert requests.get(f"{root}/health", timeout=10).json() == {"status": "ok"}

    def values():
        lines = requests.get(f"{root}/metrics", timeout=10).text.splitlines()
        return {name: float(value) for name, _, value in
                (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    client.completions.create(model="gpt2", prompt="a")
    before = values()
    client.chat.completions.create(model="gpt2", messages=HISTORY[1:2], max_tokens=7)
    running = engines["gpt2"].submit("a", max_new_tokens=10**6)
    next(iter(running.events.get, None))
    after = values()
    running.cancel()
    changes = {name: after[name] - before.get(name, 0) for name in after}
    assert changes['gpt2_requests_total{endpoint="chat/completions",status="200"}'] == 1
    assert changes['gpt2_generated_tokens_total{model="gpt2"}'] == 7
    assert changes['gpt2_prompt_tokens_total{model="gpt2"}'] > 5
    assert changes['gpt2_time_to_first_token_seconds_count{model="gpt2"}'] == 1
    assert after['gpt2_running_texts{model="gpt2"}'] == 1
    assert after['gpt2_waiting_requests{model="gpt2"}'] == 0


BODY = {"model": "char", "prompt": "abc", "max_tokens": 1}


@pytest.mark.parametrize("headers, status", [
    ({}, 200),
    ({"Host": "localhost:80"}, 200),
    ({"Host": "192.168.1.5"}, 200),
    ({"Host": "[::1]:80"}, 200),
    ({"Host": "[::"}, 403),
    ({"Host": "evil.example"}, 403),
    ({"Host": "localhost.evil.example"}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ({"Origin": "https://my.example", "X-Forwarded-Host": "my.example"}, 200),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/json; charset=utf-8"}, 200),
])
def test_pages_of_other_sites_cannot_use_a_local_server(url, headers, status):
    answer = post(f"{url}/completions", BODY, **headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    if status != 200:
        assert answer.json()["error"]["message"]


def test_hosts_and_origins_can_be_allowed(engines):
    access = Access(allow_host=("*.My.Example",), allow_origin=("https://app.example",))
    with serving(engines, access) as url:
        assert post(f"{url}/completions", BODY, Host="a.my.example").status_code == 200
        origin = {"Origin": "https://app.example"}
        answer = post(f"{url}/completions", BODY, **origin)
        assert answer.status_code == 200
        refused = post(f"{url}/completions", BODY, **origin, **{"Content-Type": "text/plain"})
        assert refused.status_code == 415
        for readable in answer, refused:
            assert readable.headers["access-control-allow-origin"] == "https://app.example"
        preflight = requests.options(f"{url}/completions", timeout=10, headers={
            **origin, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type"})
        assert preflight.status_code == 200
        assert post(f"{url}/completions", BODY, Origin="http://evil.example").status_code == 403


def test_a_space_is_open_to_all_sites(engines, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/space")
    with serving(engines) as url:
        headers = {"Host": "me-space.hf.space", "Origin": "https://huggingface.co"}
        assert post(f"{url}/completions", BODY, **headers).status_code == 200


def test_a_server_with_a_key_answers_only_those_who_send_it(engines, monkeypatch):
    monkeypatch.setenv("API_KEY", "söcret")
    with serving(engines) as url:
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert requests.get(url.replace("v1", "metrics"), timeout=10).status_code == 401
        assert requests.get(url.replace("v1", "health"), timeout=10).status_code == 200
    with serving(engines, Access(api_key="key")) as url:
        assert openai.OpenAI(base_url=url, api_key="key").models.list().data


def test_a_key_that_is_empty_is_refused_and_does_not_open_the_server():
    with pytest.raises(UserError, match="must not be empty"):
        Access(api_key="")


@pytest.mark.parametrize("path, headers, status", [
    ("v1/completions", {"Authorization": "Bearer key"}, 200),
    ("v1/completions", {"Authorization": "Bearer key", "Content-Type": "text/plain"}, 415),
    ("v1/completions", {}, 401),
    ("metrics", {}, 401),
    ("gradio_api/upload", {"X-Forwarded-For": "10.0.0.9"}, 403),
    ("gradio_api/deep_link", {}, 404),
])
def test_a_server_below_a_path_is_guarded_as_one_at_the_root(engines, path, headers, status):
    # Gradio passes GRADIO_ROOT_PATH on to FastAPI, whose routes take paths with it and without
    with serving(engines, Access(api_key="key"), root_path="/gpt2") as url:
        for root in url.removesuffix("v1"), url.removesuffix("v1") + "gpt2/":
            assert post(f"{root}{path}", BODY, **headers).status_code == status


def test_a_body_that_is_too_large_is_not_read(url):
    address = f"{url}/completions"
    assert post(address, "x" * (MAX_BODY_BYTES + 1)).status_code == 413

    def chunks():
        for _ in range(2 * MAX_BODY_BYTES // 2**16):
            yield b"x" * 2**16

    headers = {"Content-Type": "application/json"}
    answer = requests.post(address, data=chunks(), headers=headers, timeout=20)
    assert answer.status_code == 413

    address = url.replace("v1", "gradio_api/upload")
    answer = requests.post(address, data=b"x" * (MAX_UPLOAD_BYTES + 1), timeout=20)
    assert answer.status_code == 413


@pytest.mark.parametrize("headers, client, local", [
    ({"host": "localhost:7860"}, "127.0.0.1", True),
    ({"host": "[::1]:7860"}, "::1", True),
    ({"host": "192.168.1.5:7860"}, "192.168.1.9", False),
    ({"host": "localhost"}, "192.168.1.9", False),
    ({"host": "abc.gradio.live"}, "127.0.0.1", False),
    ({"host": "localhost", "x-forwarded-for": "127.0.0.1"}, "127.0.0.1", False),
    ({"host": "localhost:7860", "origin": "http://localhost:7860"}, "127.0.0.1", True),
    ({"host": "localhost:7860", "origin": "http://localhost:80"}, "127.0.0.1", False),
    ({"host": "localhost", "origin": "http://evil", "x-forwarded-host": "evil"}, "::1", False),
])
def test_only_this_machine_can_train(headers, client, local):
    request = SimpleNamespace(headers=headers, client=SimpleNamespace(host=client))
    with contextlib.nullcontext() if local else pytest.raises(UserError, match="own browser"):
        guard.require_may_train(request)


def test_a_signal_ends_a_server_that_streams_and_its_log_holds_no_prompt(tmp_path):
    port = free_port()
    command = [sys.executable, ROOT / "serve.py", "-m", "bundled:shakespeare", "--port", str(port)]
    log = tmp_path / "log"
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8)
    stream = client.completions.create(
        model="bundled:shakespeare", prompt="sécret 🦊", max_tokens=100_000, stream=True)
    next(iter(stream))
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) is not None
    assert "cret" not in log.read_text() and "🦊" not in log.read_text()


APP_THAT_LOADS_SLOWLY = """
import time
from common.program import report_user_errors
import app, checkpoint, torch

def load_model(*arguments):
    print("loading", flush=True)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        torch.ones(500, 500) @ torch.ones(500, 500)
    return real_load_model(*arguments)

real_load_model, checkpoint.load_model = checkpoint.load_model, load_model
with report_user_errors():
    app.main(app.AppConfig(model="bundled:shakespeare", port=%d))
"""


def test_ctrl_c_while_a_model_is_loaded_ends_the_page_with_one_word():
    process = subprocess.Popen(
        [sys.executable, "-c", APP_THAT_LOADS_SLOWLY % free_port()], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_the_page_serves_the_api_too():
    with running_page() as url:
        client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
        name = next(iter(client.models.list())).id
        completion = client.completions.create(model=name, prompt="ROMEO:", max_tokens=20)
        assert len(completion.choices[0].text) == 20
        assert "gradio" in requests.get(url, timeout=10).text
        assert client.chat.completions.create(
            model="bundled:shakespeare", max_tokens=5, messages=HISTORY[1:2]).choices
        assert client.models.retrieve("bundled").id.startswith("bundled:")
        assert requests.get(f"{url}health", timeout=10).json() == {"status": "ok"}

        # the guard stands before the page, too
        upload = {"files": ("file.txt", b"x" * 100)}
        for path in "process_recording", "deep_link":  # they would write files for any visitor
            for method in "GET", "POST":
                answer = requests.request(method, f"{url}gradio_api/{path}", timeout=10)
                assert answer.status_code == 404 and "switched off" in answer.text
        forwarded = {"X-Forwarded-For": "10.0.0.9"}
        for path, options in (("config", {"headers": {"Host": "evil.example"}}),
                              ("gradio_api/queue/join", {"headers": {"Origin": "http://evil"}}),
                              ("gradio_api/upload", {"files": upload, "headers": forwarded})):
            assert requests.post(f"{url}{path}", timeout=10, **options).status_code == 403
        large = requests.post(f"{url}gradio_api/queue/join", timeout=10, data=b"x" * 2**22)
        assert large.status_code == 413
