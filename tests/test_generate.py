import asyncio
import concurrent.futures
import copy
import gc
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, tiny_gpt, wait_until
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import generate
from common import devices
from common.errors import UserError
from engine import native, scheduler
from engine.forward import Forward, Segment
from engine.packed import pack_model
from engine.reader import PieceStream, Reader
from engine.sampling import Sampling, penalize, sample, weigh
from engine.scheduler import Busy, Request, Token
from generate import Engine
from tokenizer import CharTokenizer

PRECISIONS = ["float32", "bfloat16", "float16", "int8"]


def ids_of(engine, prompt, **sampling):
    """The token ids of one continuation."""
    request = engine.submit(prompt, **sampling)
    return [event.id for _, event in request if isinstance(event, Token)]


def greedy_without_cache(engine, ids, new_tokens):
    """Greedy sampling in its simplest form: the model reads the whole window for each token."""
    window, output = list(ids), []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = engine.model(torch.tensor([window]))[0]
        output.append(int(logits[0, -1, :engine.tokenizer.vocab_size].argmax()))
        if len(window) == engine.block_size:
            kept = engine.block_size // 2 - 1
            window = window[-kept:] if kept else []
        window.append(output[-1])
    return output


# --------------------------------------------------------------------------------------------------
# One request

@pytest.mark.parametrize("length", [1, 5, 15, 16])
def test_the_engine_equals_sampling_without_cache_also_past_the_context(char_engine, length):
    prompt = list(range(length))
    expected = greedy_without_cache(char_engine, prompt, 60)
    assert ids_of(char_engine, prompt, temperature=0, max_new_tokens=60) == expected


def test_logits_with_and_without_cache_are_equal(char_engine):
    request = char_engine.submit([3], max_new_tokens=15, seed=1, logprobs=99)
    tokens = [event for _, event in request if isinstance(event, Token)]
    ids = [3, *(token.id for token in tokens)]
    with torch.no_grad():
        logits = char_engine.model(torch.tensor([ids[:-1]]))[0]
    expected = logits[0, :, :char_engine.tokenizer.vocab_size].log_softmax(-1)
    for token, logprobs in zip(tokens, expected):
        in_order = [logprob for _, logprob in sorted(token.top)]
        assert in_order == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-4)


def test_a_seed_gives_one_text_and_another_seed_another(char_engine):
    def generate_with(seed):
        return char_engine.generate("the ", max_new_tokens=50, seed=seed)[0]
    assert generate_with(7) == generate_with(7) != generate_with(8)
    assert "".join(char_engine.stream("the ", max_new_tokens=50, seed=7)) == generate_with(7)


def test_samples_of_one_prompt_differ(char_engine):
    texts = char_engine.generate("the ", n=4, max_new_tokens=40, seed=7)
    assert len(set(texts)) == 4
    assert all(len(text) == 40 for text in texts)
    assert texts[0] == char_engine.generate("the ", max_new_tokens=40, seed=7)[0]


def test_generation_stops_at_end_of_text_and_leaves_it_out(gpt2_engine):
    weights = gpt2_engine.model.transformer
    with torch.no_grad():
        # the last hidden state is always ln_f's bias, and only <|endoftext|> has a logit above 0
        weights.ln_f.weight.zero_()
        weights.ln_f.bias.fill_(1.0)
        weights.wte.weight[:, :] = 0.0
        weights.wte.weight[50256] = 1.0
    assert gpt2_engine.generate("Hello", n=2, temperature=0, max_new_tokens=10) == ["", ""]
    assert list(gpt2_engine.stream("Hello", temperature=0, max_new_tokens=10)) == []
    # with logprobs, the end has one
    (_, token), (_, reason) = gpt2_engine.submit("Hello", temperature=0, logprobs=1)
    assert token.id == 50256 and token.top[0] == (50256, token.logprob) and reason == "stop"


def test_padding_ids_are_never_sampled(gpt2_engine):
    weights = gpt2_engine.model.transformer
    with torch.no_grad():
        weights.wte.weight[50257:] = 1e3 * weights.ln_f.bias
    request = gpt2_engine.submit(
        [15496], n=8, max_new_tokens=20, temperature=2.0, seed=0, logprobs=20)
    tokens = [event for _, event in request if isinstance(event, Token)]
    assert len(tokens) > 100 and max(token.id for token in tokens) < 50257
    assert all(i < 50257 for token in tokens for i, _ in token.top)


def test_a_long_prompt_keeps_its_end_and_says_so(char_engine):
    prompt = "z" * 50 + "abcdefghijklmnop"
    ids, notices = char_engine.encode(prompt)
    assert char_engine.tokenizer.decode(ids) == "abcdefghijklmnop"
    assert len(notices) == 1 and "66 tokens" in notices[0]
    with pytest.warns(UserWarning, match="66 tokens"):
        text = char_engine.generate(prompt, seed=1, max_new_tokens=9)
    assert text == char_engine.generate("abcdefghijklmnop", seed=1, max_new_tokens=9)


def test_an_empty_prompt_and_no_new_tokens_are_fine(char_engine, gpt2_engine):
    assert len(char_engine.generate("", max_new_tokens=5)[0]) == 5
    assert gpt2_engine.encode("")[0] == [50256]
    assert char_engine.generate("abc", max_new_tokens=0, n=2) == ["", ""]


def test_a_notice_names_unknown_characters(char_engine):
    assert "ЖQ" in char_engine.encode("aЖbQ")[1][0]


def test_the_smallest_temperature_is_greedy(char_engine):
    texts = [char_engine.generate("the ", temperature=temperature, max_new_tokens=20, seed=1)
             for temperature in (0, 1e-6, 1e-320)]
    assert texts[0] == texts[1] == texts[2]


def test_predictions_that_are_not_numbers_are_an_error(char_engine):
    with torch.no_grad():
        char_engine.model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(UserError, match="not numbers"):
        char_engine.generate("abc")


@pytest.mark.parametrize("option", [
    {"prompt": []}, {"temperature": -0.1}, {"temperature": math.nan}, {"max_new_tokens": -1},
    {"n": 0}, {"n": 33}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0},
    {"logprobs": -1}, {"stop": [""]}, {"stop": ["a" * 101]}, {"stop": ["a"] * 9}])
def test_values_out_of_range_are_user_errors(char_engine, option):
    with pytest.raises(UserError):
        char_engine.submit(**{"prompt": [5], **option})


# --------------------------------------------------------------------------------------------------
# Precisions and kernels

CHARS = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")


def wide_engine(dtype="float32", block_size=160, **limits):
    """Wide enough for the kernels' inner loops, with a context of more than two chunks."""
    model = tiny_gpt(vocab_size=32, block_size=block_size, n_head=4, n_embd=64)
    return Engine(model, CHARS, dtype, **limits)


SHAPES = [
    {},
    {"n_head": 8},
    {"n_head": 1},
    {"n_head": 1, "n_embd": 72, "vocab_size": 27},
    {"activation": "gelu"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_native_step_equals_torchs(dtype, shape):
    model = tiny_gpt(**{"block_size": 160, "n_head": 4, "n_embd": 64, **shape})
    steps = native.make_forward(model, dtype), Forward(model, dtype)
    assert steps[0].backend == "by native.cpp", "these tests need a machine with AVX2 and g++"

    # prompt chunks and sampled tokens in turn
    ids = (torch.arange(140) * 7 % 27).tolist()
    plan = [(0, 64, False), (64, 100, False), (100, 101, True), (101, 128, False), (128, 129, True)]
    logits = []
    for step in steps:
        cache, parts = step.new_cache(), []
        for start, stop, sampled in plan:
            segment = Segment(cache, start, ids[start:stop], sampled)
            parts.append(step([segment], range(stop - start)))
        logits.append(torch.cat(parts))  # (129, V)
    ours, torchs = logits

    with torch.no_grad():
        exact = copy.deepcopy(model).double()(torch.tensor([ids[:129]]))[0][0]
    # int8 is less exact, because the two round a few inputs differently
    tolerance = {"float32": 2e-6, "int8": 2e-2}.get(dtype, 5e-5)
    assert (ours - torchs).abs().mean() < tolerance
    assert (ours - exact).abs().mean() < 1.1 * (torchs - exact).abs().mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_int8_products_do_not_overflow(sign):
    model = tiny_gpt(n_embd=64)
    with torch.no_grad():
        for block in model.transformer.h:
            # if these were rounded to 127, the sum of four products would need 17 bits
            block.mlp.c_fc.weight.fill_(sign)
    ours, torchs = native.make_forward(model, "int8"), Forward(model, "int8")
    assert ours.backend == "by native.cpp"
    logits = [step([Segment(step.new_cache(), 0, list(range(16)))], range(16))
              for step in (ours, torchs)]
    assert (logits[0] - logits[1]).abs().mean() < 2e-2


def test_torch_runs_the_step_if_native_cpp_cannot(monkeypatch, tmp_path):
    def backend(**sizes):
        return native.make_forward(tiny_gpt(**sizes), "int8").backend

    # forget the libraries that other tests have loaded
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert backend(n_head=4).endswith("the head size is not a multiple of 8")

    settings = {"prompt": [3, 1, 4], "max_new_tokens": 12, "temperature": 0}
    expected = ids_of(wide_engine(), **settings)
    assert len(list(tmp_path.glob("cache/*/native-*.so"))) == 1, "compiled once, into the cache"

    # a source that does not compile, then no compiler, then a cache folder that cannot exist
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
    native.SOURCE.write_text("no C++")
    assert backend().endswith("g++ cannot compile it")
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = wide_engine()
    assert ids_of(engine, **settings) == expected
    assert engine.forward.backend.endswith("g++ is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(native.SOURCE))
    assert ids_of(wide_engine(), **settings) == expected

    # an old CPU
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert backend().endswith("this CPU has no AVX2")


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.inference_mode()
def test_rows_of_a_product_do_not_depend_on_each_other(dtype):
    torch.manual_seed(0)
    for width in 16, 18, 64, 192:
        with torch.inference_mode(False):
            model = pack_model(tiny_gpt(vocab_size=1000, n_layer=1, n_embd=width), dtype)
        mlp = model.transformer.h[0].mlp
        hidden = torch.randn(300, 4 * width) * torch.logspace(-3, 3, 300)[:, None]
        x = hidden[:, :width].contiguous()
        layers = [(model.logits, x), (mlp.c_fc, x), (mlp.c_proj, hidden), (mlp.act, hidden)]
        for layer, inputs in layers:
            expected = layer(inputs)
            for count in (1, 2, 3, 4, 5, 7, 8, 24, 31, 32, 33, 44, 64, 100, 128, 299):
                rows = layer(inputs[-count:].clone())
                assert torch.equal(rows, expected[-count:]), (layer, count)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision_generates(dtype):
    model = tiny_gpt()
    engine = Engine(model, CharTokenizer("\n abc"), dtype)
    assert engine.dtype == dtype
    assert len(engine.generate("abc", max_new_tokens=30)[0]) == 30
    assert next(model.parameters()).dtype == torch.float32, "the caller's model is unchanged"


def test_the_automatic_precision_depends_on_the_models_size(monkeypatch):
    assert Engine(tiny_gpt(), CharTokenizer("abc")).dtype == "float32"
    monkeypatch.setattr(generate, "LARGE_MODEL", 1000)
    assert Engine(tiny_gpt(), CharTokenizer("abc")).dtype == "int8"


# --------------------------------------------------------------------------------------------------
# Many requests

def crowd(count=32):
    """(prompt, settings) pairs that vary in all settings, and in where chunks and context end."""
    random = torch.Generator().manual_seed(4)
    for i in range(count):
        length = [1, 3, 63, 64, 65, 100, 128, 150][i % 8]
        prompt = torch.randint(0, 30, (length,), generator=random).tolist()
        yield prompt, {
            "seed": i,
            "max_new_tokens": 20 + 5 * (i % 9),
            "temperature": [0, 0.7, 1.3][i % 3],
            "top_k": [None, 5][i % 2],
            "top_p": [1.0, 0.9][i // 2 % 2],
            "repetition_penalty": [1.0, 1.2][i // 4 % 2],
        }


@pytest.mark.parametrize("native, threads", [(True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_text_is_the_same_alone_and_in_a_crowd(dtype, native, threads):
    torch.set_num_threads(threads)
    single = wide_engine(dtype, native=native, prefix_bytes=0)
    together = wide_engine(dtype, native=native, prefix_bytes=2**28)
    expected = [ids_of(single, prompt, **settings) for prompt, settings in crowd()]

    # all at once
    requests = [together.submit(prompt, **settings) for prompt, settings in crowd()]
    outputs = [[event.id for _, event in request if isinstance(event, Token)]
               for request in requests]
    assert outputs == expected

    # again in any order, with prefixes from the cache, while some readers leave
    def read(number, prompt, settings):
        if number % 5 == 0:
            next(iter(together.stream(prompt, **settings)))
        return ids_of(together, prompt, **settings)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(read, i, *request) for i, request in enumerate(crowd())]
        assert [future.result() for future in futures] == expected


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_cached_prefix_changes_no_bit(dtype, native):
    cached = wide_engine(dtype, native=native)
    fresh = wide_engine(dtype, native=native, prefix_bytes=0)
    prompt = (torch.arange(140) * 7 % 30).tolist()
    follow_up = prompt[:100] + ids_of(cached, prompt[:100], max_new_tokens=30, seed=1)
    fork = [*prompt[:70], 5, 5, 5]
    for ids in prompt[:100], prompt[:100], prompt, prompt[:77], fork, follow_up, prompt[:1]:
        events = [[event for _, event in engine.submit(ids, max_new_tokens=9, seed=3, logprobs=30)]
                  for engine in (cached, fresh)]
        assert events[0] == events[1]


def record_steps(engine) -> list[list[tuple[int, bool]]]:
    """Records the engine's steps: a list of (number of tokens, sampled) per step and segment."""
    steps, forward = [], engine.scheduler.forward

    def record(segments, rows):
        steps.append([(len(segment.ids), segment.sampled) for segment in segments])
        return forward(segments, rows)

    record.new_cache = forward.new_cache
    engine.scheduler.forward = record
    return steps


@pytest.mark.parametrize("native", [True, False])
def test_a_known_prompt_costs_one_short_step(native):
    engine = wide_engine(native=native)
    steps = record_steps(engine)

    def computed_tokens(ids):
        steps.clear()
        ids_of(engine, ids, max_new_tokens=1)
        return sum(tokens for segments in steps for tokens, _ in segments)

    prompt = list(range(30)) * 4
    assert computed_tokens(prompt) == 120
    assert computed_tokens(prompt) == 1
    assert computed_tokens(prompt[:90]) == 1
    assert computed_tokens([*prompt[:90], 7, 7]) == 2
    # a follow-up; torch's attention for one sampled token is not bit for bit that of a prompt
    text = prompt + ids_of(engine, prompt, max_new_tokens=20)
    assert computed_tokens(text) == (1 if native else 20)


def test_the_prefix_cache_drops_the_oldest_entries_to_keep_to_its_size():
    chunk_bytes = 64 * 2 * 2 * 64 * 4  # tokens, keys and values, layers, channels, float32
    engine = wide_engine(prefix_bytes=3 * chunk_bytes)
    for i in range(6):
        ids_of(engine, [i] * 40, max_new_tokens=1)
    assert [ids[0] for ids, _ in engine.scheduler.prefixes.entries] == [3, 4, 5]


def test_a_long_prompt_does_not_stall_other_texts():
    engine = wide_engine(block_size=1024)
    steps = record_steps(engine)
    other = engine.submit([1, 2], max_new_tokens=10**9)
    next(iter(other.events.get, None))
    list(engine.submit((torch.arange(1000) % 30).tolist(), max_new_tokens=1))
    other.cancel()

    with_prompt = []
    for segments in steps:
        sampled = [tokens for tokens, sampled in segments if sampled]
        prompt = sum(tokens for tokens, sampled in segments if not sampled)
        if prompt > 2:
            with_prompt.append((sampled, prompt))
    assert len(with_prompt) >= 1000 // scheduler.CHUNK, "one chunk of the prompt per step"
    for sampled, prompt in with_prompt:
        assert sampled == [1] and prompt <= scheduler.CHUNK, "and one token of the other text"


def test_a_reader_that_leaves_frees_its_place_for_those_that_wait():
    engine = wide_engine(max_running=2)
    requests = [engine.submit([i], max_new_tokens=100_000) for i in range(4)]
    for request in requests[:2]:
        next(iter(request))  # the iterator is closed at once, which cancels the request
    for request in requests[2:]:
        assert isinstance(next(iter(request))[1], Token)
    engine.scheduler.thread.join(30)
    assert engine.scheduler.load() == (0, 0)


def test_a_full_queue_and_a_long_wait_are_busy():
    engine = wide_engine(max_running=1, max_waiting=2, deadline_s=3.0)
    requests = [engine.submit([i], max_new_tokens=10**9) for i in range(3)]
    requests[1].deadline += 60  # it still runs when the third one's time is over
    with pytest.raises(Busy, match="number 3 in the queue"):
        engine.submit([9])
    wait_until(lambda: engine.scheduler.load()[0])
    assert [request.queue_position() for request in requests] == [0, 1, 2]
    assert list(requests[0])[-1] == (0, "deadline")
    with pytest.raises(Busy, match="after 3 s this request was still number"):
        list(requests[2])
    requests[1].cancel()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_samples_that_start_one_after_another_are_those_that_start_together(dtype):
    settings = {"n": 6, "max_new_tokens": 25, "seed": 4, "logprobs": 2}
    roomy, narrow = wide_engine(dtype), wide_engine(dtype, max_running=6)
    prompt = (torch.arange(100) * 7 % 30).tolist()
    expected = sorted(roomy.submit(prompt, **settings), key=lambda event: event[0])
    others = [narrow.submit([i], max_new_tokens=10**9) for i in range(4)]
    request = narrow.submit(prompt, **settings)
    assert sorted(request, key=lambda event: event[0]) == expected
    assert narrow.scheduler.load() == (4, 0)
    for other in others:
        other.cancel()


def test_clients_share_the_places_fairly():
    engine = wide_engine(max_running=32)
    greedy = [engine.submit([1], 1, "greedy", max_new_tokens=10**9) for _ in range(30)]
    wait_until(lambda: engine.scheduler.load()[0] >= 24)
    modest = [engine.submit([2], 1, "modest", max_new_tokens=10**9) for _ in range(8)]
    wait_until(lambda: engine.scheduler.load()[0] >= 30)
    started = [sum(request.started for request in requests) for requests in (greedy, modest)]
    assert started == [24, 6], "each leaves a third of its own number free"
    third = ids_of(engine, [2], client="third", max_new_tokens=5, seed=1)
    assert third == ids_of(wide_engine(), [2], max_new_tokens=5, seed=1)
    # a place that becomes free is for the client that has fewer
    greedy[0].cancel()
    wait_until(lambda: modest[6].started)
    for request in greedy + modest:
        request.cancel()


def test_a_client_can_fill_half_of_the_queue():
    engine = wide_engine(max_running=1, max_waiting=4)
    requests = [engine.submit([1], client="greedy", max_new_tokens=10**9) for _ in range(3)]
    with pytest.raises(Busy, match="number 3 in the queue, which holds 2"):
        engine.submit([1], client="greedy")
    requests.append(engine.submit([1], client="other"))
    for request in requests:
        request.cancel()


def test_an_error_ends_the_samples_that_have_not_started(char_engine):
    scheduler = char_engine.scheduler
    scheduler.max_running = 2
    other = char_engine.submit([1], max_new_tokens=10**9)
    request = char_engine.submit([2], 2, max_new_tokens=10**9)
    wait_until(lambda: request.prefilled)

    def fail(*_):
        raise UserError("out of memory")

    fail.new_cache = scheduler.forward.new_cache  # for a text that has filled its context
    scheduler.forward = fail
    for failed in other, request:
        with pytest.raises(UserError, match="out of memory"):
            list(failed)
    assert scheduler.load() == (0, 0) and not scheduler.waiting


def test_all_texts_advance_together():
    engine = wide_engine(max_running=8)
    requests = [engine.submit([i], max_new_tokens=10**9) for i in range(8)]
    wait_until(lambda: min(request.events.qsize() for request in requests) >= 50)
    before = [request.events.qsize() for request in requests]
    wait_until(lambda: min(request.events.qsize() for request in requests) >= 500)
    growth = [request.events.qsize() - size for request, size in zip(requests, before)]
    for request in requests:
        request.cancel()
    assert min(growth) > 0.8 * max(growth)  # the scheduler may take a step while we count


def test_many_threads_share_an_engine_and_its_thread_ends(char_engine, monkeypatch):
    monkeypatch.setattr(scheduler, "IDLE_S", 0.05)

    def generate_with(seed):
        return char_engine.generate("the ", seed=seed, max_new_tokens=20)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(generate_with, [0, 1] * 8))
    assert texts == texts[:2] * 8
    thread = char_engine.scheduler.thread
    assert thread is None or (not thread.join(5) and not thread.is_alive())
    assert generate_with(0) == texts[0], "the next request starts a new thread"


EXIT_WHILE_A_THREAD_FREES_ITS_MODEL = """
import time
from conftest import tiny_gpt
from engine import scheduler
from engine.forward import Forward

class SlowToFree:
    def __del__(self):
        time.sleep(1)
        print("freed", flush=True)

scheduler.IDLE_S = 0.2
forward = Forward(tiny_gpt(), "float32")
forward.slow = SlowToFree()
request = scheduler.Scheduler(forward, 32, None, 16).submit([1])
list(request)
del request, forward
time.sleep(0.7)  # by now the idle thread is freeing the model
"""


def test_python_waits_at_exit_for_a_thread_that_is_freeing_its_model():
    result = subprocess.run([sys.executable, "-c", EXIT_WHILE_A_THREAD_FREES_ITS_MODEL],
                            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "freed\n"), result.stderr


def test_a_cgroup_quota_limits_the_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert devices.allowed_cores() == 64
    # cgroup v2
    for content, cores in (("max 100000\n", 64), ("200000 100000\n", 2), ("150000 100000\n", 2),
                           ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(content)
        assert devices.allowed_cores() == cores
    (tmp_path / "cpu.max").unlink()
    # cgroup v1
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert devices.allowed_cores() == 3


# --------------------------------------------------------------------------------------------------
# Stop strings and streams

def test_a_stop_string_ends_the_text_and_is_never_shown(char_engine):
    full = char_engine.generate("the ", max_new_tokens=60, seed=4)[0]
    for stop in (full[0], full[7:9], full[20:25], "never ", ("#", full[30:33])):
        pieces = list(char_engine.stream("the ", max_new_tokens=60, seed=4, stop=stop))
        stops = [stop] if isinstance(stop, str) else stop
        positions = [full.find(s) for s in stops if s in full]
        assert "".join(pieces) == full[:min(positions, default=60)], stop


def stream_of(engine, request, idle_s=3600.0) -> PieceStream:
    return PieceStream([Reader(engine.tokenizer, request)], idle_s)


async def read_texts(stream, count) -> list[str]:
    """The texts of `count` readers. Fails after a minute, which is less than `stream_of` waits."""
    texts = [""] * count
    async with asyncio.timeout(60):
        async for batch in stream:
            for i, piece in batch:
                texts[i] += piece.text
    return texts


def test_a_piece_stream_reads_requests_of_several_engines():
    engines = [wide_engine(), wide_engine(block_size=32)]
    settings = {"prompt": "the fox ", "max_new_tokens": 40, "seed": 7}
    expected = [engine.generate(**settings)[0] for engine in engines]
    readers = [Reader(engine.tokenizer, engine.submit(**settings)) for engine in engines]
    assert asyncio.run(read_texts(PieceStream(readers, 3600.0), 2)) == expected


def test_a_piece_stream_ends_without_another_wait(char_engine, monkeypatch):
    def no_wait(*_):
        raise AssertionError("waited although all samples have ended")

    settings = {"prompt": "the ", "max_new_tokens": 5, "seed": 1}
    expected = char_engine.generate(**settings)
    request = char_engine.submit(**settings)
    wait_until(lambda: char_engine.scheduler.load() == (0, 0))
    stream = stream_of(char_engine, request)
    monkeypatch.setattr(stream.arrived, "wait", no_wait)
    assert asyncio.run(read_texts(stream, 1)) == expected


def test_a_piece_stream_gives_an_empty_batch_if_nothing_arrives():
    engine = wide_engine(max_running=1)
    running = engine.submit([1], max_new_tokens=10**9)
    waiting = engine.submit([2], max_new_tokens=10**9)

    async def first_batch():
        return await anext(stream_of(engine, waiting, idle_s=0.01))

    assert asyncio.run(first_batch()) == []
    running.cancel()


@pytest.mark.parametrize("way", ["closed", "cancelled", "deleted", "never read"])
def test_a_request_is_cancelled_when_its_piece_stream_is(char_engine, way):
    request = char_engine.submit([3], max_new_tokens=10**9)
    stream = stream_of(char_engine, request)

    async def read_and_leave():
        nonlocal stream
        if way == "never read":
            del stream
            return
        await anext(stream)
        assert request.active
        if way == "closed":
            stream.close()
        elif way == "cancelled":
            task = asyncio.create_task(read_texts(stream, 1))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
        else:
            del stream

    asyncio.run(read_and_leave())
    gc.collect()
    assert not request.active and request.wake is None


def test_a_request_is_cancelled_when_its_event_loop_is_closed(char_engine):
    request = char_engine.submit([3], max_new_tokens=10**9)
    stream = stream_of(char_engine, request)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(stream))
    loop.close()
    char_engine.scheduler.thread.join(30)
    assert not request.active and char_engine.scheduler.load() == (0, 0)
    assert len(char_engine.generate("abc", max_new_tokens=5)[0]) == 5, "others are still served"


def test_events_before_an_error_are_delivered_first(char_engine):
    request = Request(char_engine.scheduler, [3], 1, Sampling())
    request.put((0, Token(5)))
    request.put(Busy("too late"))
    assert request.take_events() == [(0, Token(5))]
    with pytest.raises(Busy, match="too late"):
        request.take_events()


# --------------------------------------------------------------------------------------------------
# The distribution

def frequencies(logits, draws=20_000, **options):
    """The share of each id among evenly spread draws."""
    ids = [sample(logits.numpy(), (i + 0.5) / draws, **options) for i in range(draws)]
    return torch.bincount(torch.tensor(ids), minlength=logits.size(-1)) / draws


@pytest.mark.parametrize("size", [20, 64, 500])
def test_draws_follow_the_softmax_at_any_temperature(size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        actual = frequencies(logits, temperature=temperature)
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


OPTIONS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 5000},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"top_p": 0.9999},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 700, "top_p": 0.9},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
]


@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_filtered_distribution_is_that_of_transformers(options, size):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    theirs = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits)
    if "top_k" in options:
        theirs = TopKLogitsWarper(min(options["top_k"], size))(None, theirs)
    if "top_p" in options:
        theirs = TopPLogitsWarper(options["top_p"])(None, theirs)
    weights, ids = weigh(logits[0].numpy(), **{"temperature": 1.0, **options})
    ours = torch.zeros(size)
    ours[torch.arange(size) if ids is None else ids] = torch.tensor(weights)
    torch.testing.assert_close(ours / ours.sum(), theirs.softmax(-1)[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS[1::3])
def test_draws_follow_the_filtered_distribution(options):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    weights, ids = weigh(logits.numpy(), **{"temperature": 1.0, **options})
    expected = torch.zeros(50)
    expected[ids] = torch.tensor(weights / weights.sum())
    torch.testing.assert_close(frequencies(logits, **options), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    ids = [3, 7, 7, 3, 49]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())[0]
    ours = penalize(logits[0].numpy(), set(ids), penalty)
    torch.testing.assert_close(torch.tensor(ours), theirs)


def test_the_penalty_covers_prompt_and_sampled_tokens(char_engine):
    ids = ids_of(char_engine, [1, 2, 3], temperature=0, repetition_penalty=1e6, max_new_tokens=13)
    assert len({1, 2, 3, *ids}) == 16, "no token occurs twice while there are others"


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e45, 1e308])
def test_the_largest_and_smallest_penalties_leave_a_distribution(penalty):
    logits = np.array([-2, -1, 0, 1, 2], np.float32)
    penalized = penalize(logits, {0, 1, 2, 3, 4}, penalty)
    assert np.isfinite(penalized).all()
    assert 0 <= sample(penalized, 0.5) < 5


def test_temperature_0_takes_the_likeliest_token():
    for logits in torch.randn(6, 50, generator=torch.Generator().manual_seed(2)):
        assert sample(logits.numpy(), 0.99, temperature=0) == logits.argmax()


def test_a_draw_never_selects_a_token_of_probability_0():
    logits = torch.full((130,), -math.inf)
    logits[[5, 77]] = 0.0
    draws = [sample(logits.numpy(), uniform) for uniform in (0.0, 0.49, 0.51, 1 - 2**-53)]
    assert draws == [5, 5, 77, 77]


# --------------------------------------------------------------------------------------------------
# Scoring

def test_scores_are_the_models_log_probabilities(gpt2_engine):
    ids = gpt2_engine.tokenizer.encode("The fox went out")
    with torch.no_grad():
        logits = gpt2_engine.model(torch.tensor([[50256, *ids]]))[0]
    logprobs = logits[0, :, :50257].log_softmax(-1)
    expected = [logprobs[i, token].item() for i, token in enumerate(ids)]
    assert gpt2_engine.score("The fox went out") == pytest.approx(expected, abs=1e-4)


def test_without_an_end_of_text_token_the_first_score_is_none(char_engine):
    scores = char_engine.score("abc")
    assert scores[0] is None and all(score < 0 for score in scores[1:])
    assert char_engine.score("") == []


def test_scores_of_a_long_text_use_at_least_half_a_context(char_engine):
    text = "the fox went out on a chilly night and prayed for the moon to give him light"
    ids, scores = char_engine.tokenizer.encode(text), char_engine.score(text)
    assert len(scores) == len(ids)
    for i in range(1, len(ids)):
        # a window has 16 tokens, and each one after the first scores 9 new tokens
        start = 0 if i <= 16 else i - 8 - (i - 17) % 9
        with torch.no_grad():
            logits = char_engine.model(torch.tensor([ids[start:i]]))[0]
        logprobs = logits[0, -1, :char_engine.tokenizer.vocab_size].log_softmax(-1)
        assert scores[i] == pytest.approx(logprobs[ids[i]].item(), abs=1e-4), i


def test_inspect_lists_the_likeliest_alternatives(char_engine):
    tokens = char_engine.inspect("the fox", top=3)
    assert "".join(token["text"] for token in tokens) == "the fox"
    for token in tokens[1:]:
        best = [logprob for _, logprob in token["top"]]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token["logprob"] <= best[0] + 1e-6


# --------------------------------------------------------------------------------------------------
# The command line

def test_a_seed_prints_the_same_texts_each_time(command, command_here):
    arguments = ["-m", "bundled:shakespeare", "-p", "ROMEO:", "-n", 3, "--seed", 42]
    output = command("generate.py", *arguments).stdout
    assert output == command_here("generate.py", *arguments).stdout
    texts = output.removesuffix("\n").split("\n--------\n")
    assert len(set(texts)) == 3
    for text in texts:
        assert text.startswith("ROMEO:") and len(text) == len("ROMEO:") + 256


def test_without_a_prompt_it_asks_for_prompts(command):
    done = command("generate.py", "-m", "bundled:shakespeare", "--seed", 1,
                   "--max-new-tokens", 20, typed="ROMEO:\nЯ\n")
    expected = r"\n> ROMEO:[^Я]{20}\n\n> Я[^Я]{20}\n\n> \n"
    assert re.fullmatch(expected, done.stdout), done.stdout
    assert "alphabet lacks" in done.stderr and done.stderr.count("seed 1") == 2


def test_a_prompt_from_a_file_or_standard_input_and_output_as_json(
        command, command_here, tmp_path):
    prompt = "ROMEO:\nWhat"
    (tmp_path / "beginning.txt").write_text(prompt)
    options = ["-m", "bundled:shakespeare", "--seed", 3, "--max-new-tokens", 40]
    output = command_here("generate.py", *options, "--file", "beginning.txt").stdout
    assert output == command("generate.py", *options, "--file", "-", typed=prompt).stdout

    lines = command_here("generate.py", *options, "--file", "beginning.txt", "-n", 2, "--json",
                         "--stop", "\\n").stdout.splitlines()
    samples = [json.loads(line) for line in lines]
    text = output.removeprefix(prompt).removesuffix("\n")
    assert samples[0]["text"] == text.partition("\n")[0] and samples[0]["prompt"] == prompt
    assert [sample["index"] for sample in samples] == [0, 1] and samples[0]["seed"] == 3
    assert samples[0]["finish_reason"] == ("stop" if "\n" in text else "length")


@pytest.mark.parametrize("arguments, message", [
    (["--temperature", -1], "temperature must be 0 or more"),
    (["--max-new-tokens", -5], "max_new_tokens must be 0 or more"),
    (["-m", "bundled:none"], "no bundled model"),
    (["-m", "no/such/model"], "no file, folder or run"),
    (["--device", "abacus"], "no device"),
])
def test_bad_input_is_a_user_error(arguments, message):
    config = tyro.cli(generate.GenerateConfig, args=["-p", "x", *map(str, arguments)])
    with pytest.raises(UserError, match=message):
        generate.main(config)
