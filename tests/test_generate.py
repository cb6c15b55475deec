import concurrent.futures
import copy
import json
import math
import re
import time

import pytest
import torch
import tyro
from conftest import tiny_gpt
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
from engine.sampling import penalize, sample, weigh
from engine.scheduler import Busy, Token
from generate import Engine
from tokenizer import CharTokenizer

PRECISIONS = ["float32", "bfloat16", "float16", "int8"]


def ids_of(engine, prompt, **sampling):
    """The tokens of one continuation."""
    return [event.id for _, event in engine.submit(prompt, **sampling) if isinstance(event, Token)]


def continue_plainly(engine, ids, new_tokens):
    """Greedy sampling as the contract words it: no cache, the whole window anew for each token."""
    window, out = list(ids), []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = engine.model(torch.tensor([window]))[0][0, -1, :engine.tokenizer.vocab_size]
        out.append(int(logits.argmax()))
        if len(window) == engine.block_size:
            window = window[-(engine.block_size // 2 - 1):] if engine.block_size > 2 else []
        window.append(out[-1])
    return out


@pytest.mark.parametrize("length", [1, 5, 15, 16])
def test_the_cached_engine_writes_what_plain_sampling_writes_also_past_the_context(char_engine, length):
    prompt = list(range(length))
    assert ids_of(char_engine, prompt, temperature=0, max_new_tokens=60) == continue_plainly(char_engine, prompt, 60)


def test_cached_logits_are_the_uncached_ones(char_engine):
    tokens = [event for _, event in char_engine.submit([3], max_new_tokens=15, seed=1, logprobs=99) if isinstance(event, Token)]
    ids = [3, *(token.id for token in tokens)]
    with torch.no_grad():
        full = char_engine.model(torch.tensor([ids[:-1]]))[0][0, :, :char_engine.tokenizer.vocab_size].log_softmax(-1)
    for token, logprobs in zip(tokens, full):
        assert [logprob for _, logprob in sorted(token.top)] == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-4)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(char_engine):
    texts = [char_engine.generate("the ", max_new_tokens=50, seed=seed)[0] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    assert "".join(char_engine.stream("the ", max_new_tokens=50, seed=7)) == texts[0]


def test_several_samples_share_a_prompt_and_differ(char_engine):
    texts = char_engine.generate("the ", n=4, max_new_tokens=40, seed=7)
    assert len(set(texts)) == 4
    assert all(len(text) == 40 for text in texts)
    assert texts[0] == char_engine.generate("the ", max_new_tokens=40, seed=7)[0]


def test_generation_stops_at_end_of_text_and_leaves_it_out(gpt2_engine):
    weights = gpt2_engine.model.transformer
    with torch.no_grad():  # the last hidden state is always ln_f's bias: let it point at <|endoftext|>
        weights.ln_f.weight.zero_()
        weights.ln_f.bias.fill_(1.0)
        weights.wte.weight[:, :] = 0.0
        weights.wte.weight[50256] = 1.0
    assert gpt2_engine.generate("Hello", n=2, temperature=0, max_new_tokens=10) == ["", ""]
    assert list(gpt2_engine.stream("Hello", temperature=0, max_new_tokens=10)) == []


def test_padding_ids_are_never_sampled(gpt2_engine):
    with torch.no_grad():
        gpt2_engine.model.transformer.wte.weight[50257:] = 1e3 * gpt2_engine.model.transformer.ln_f.bias
    events = [event for _, event in gpt2_engine.submit([15496], n=8, max_new_tokens=20, temperature=2.0, seed=0, logprobs=50257)]
    tokens = [event for event in events if isinstance(event, Token)]
    assert len(tokens) > 100 and max(token.id for token in tokens) < 50257
    assert all(i < 50257 for token in tokens for i, _ in token.top)


def test_a_long_prompt_keeps_its_end_and_says_so(char_engine):
    ids, notices = char_engine.encode("z" * 50 + "abcdefghijklmnop")
    assert char_engine.tokenizer.decode(ids) == "abcdefghijklmnop"
    assert len(notices) == 1 and "66 tokens" in notices[0]
    with pytest.warns(UserWarning, match="66 tokens"):
        long = char_engine.generate("z" * 50 + "abcdefghijklmnop", seed=1, max_new_tokens=9)
    assert long == char_engine.generate("abcdefghijklmnop", seed=1, max_new_tokens=9)


def test_an_empty_prompt_and_no_tokens_are_fine(char_engine, gpt2_engine):
    assert len(char_engine.generate("", max_new_tokens=5)[0]) == 5
    assert gpt2_engine.encode("")[0] == [50256]
    assert char_engine.generate("abc", max_new_tokens=0, n=2) == ["", ""]


def test_characters_the_model_lacks_are_named(char_engine):
    assert "ЖQ" in char_engine.encode("aЖbQ")[1][0]


def test_the_smallest_temperature_is_near_greedy(char_engine):
    texts = [char_engine.generate("the ", temperature=t, max_new_tokens=20, seed=1) for t in (0, 1e-6, 1e-320)]
    assert texts[0] == texts[1] == texts[2]


def test_predictions_that_are_no_numbers_are_not_sampled(char_engine):
    with torch.no_grad():
        char_engine.model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(UserError, match="not numbers"):
        char_engine.generate("abc")


@pytest.mark.parametrize("option", [{"prompt": []}, {"temperature": -0.1}, {"temperature": math.nan}, {"max_new_tokens": -1},
                                    {"n": 0}, {"n": 33}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5},
                                    {"repetition_penalty": 0}, {"logprobs": -1}, {"stop": [""]}])
def test_values_out_of_range_get_one_sentence(char_engine, option):
    with pytest.raises(UserError):
        char_engine.submit(**{"prompt": [5], **option})


# ----------------------------------------------------------------------------------------------------------------
# Many people

CHARS = CharTokenizer("\n ,.abcdefghijklmnopqrstuvwxyz")


def wide_engine(dtype="float32", block_size=160, **limits):
    """Wide enough for the kernels' inner loops, with a context of more than two chunks."""
    return Engine(tiny_gpt(vocab_size=32, block_size=block_size, n_head=4, n_embd=64), CHARS, dtype, **limits)


def crowd(count=32):
    """(prompt, settings) of texts as different as people's: lengths across chunks, ends across the context, all settings."""
    random = torch.Generator().manual_seed(4)
    for i in range(count):
        length = [1, 3, 63, 64, 65, 100, 128, 150][i % 8]
        yield torch.randint(0, 30, (length,), generator=random).tolist(), {
            "seed": i, "max_new_tokens": 20 + 5 * (i % 9), "temperature": [0, 0.7, 1.3][i % 3], "top_k": [None, 5][i % 2],
            "top_p": [1.0, 0.9][i // 2 % 2], "repetition_penalty": [1.0, 1.2][i // 4 % 2]}


@pytest.mark.parametrize("native, threads", [(True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_text_is_the_same_alone_and_in_a_crowd(dtype, native, threads):
    torch.set_num_threads(threads)
    alone, together = (wide_engine(dtype, native=native, prefix_bytes=size) for size in (0, 2**28))
    expected = [ids_of(alone, prompt, **settings) for prompt, settings in crowd()]
    requests = [together.submit(prompt, **settings) for prompt, settings in crowd()]
    assert [[event.id for _, event in request if isinstance(event, Token)] for request in requests] == expected
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # again, in any order, from the cache and with some who leave
        def one(number, prompt, settings):
            if number % 5 == 0:
                next(iter(together.stream(prompt, **settings)))
            return ids_of(together, prompt, **settings)
        assert [future.result() for future in
                [pool.submit(one, i, *text) for i, text in enumerate(crowd())]] == expected


SHAPES = [{}, {"n_head": 8}, {"n_head": 1}, {"n_head": 1, "n_embd": 72, "vocab_size": 27}, {"activation": "gelu"}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_native_step_is_torchs(dtype, shape):
    model = tiny_gpt(**{"block_size": 160, "n_head": 4, "n_embd": 64, **shape})
    ours, plain = native.make_forward(model, dtype), Forward(model, dtype)
    assert ours.backend == "by native.cpp", "a machine that runs these tests has AVX2 and g++"
    ids, caches, logits = (torch.arange(140) * 7 % 27).tolist(), (ours.new_cache(), plain.new_cache()), ([], [])
    for start, stop, sampled in (0, 64, False), (64, 100, False), (100, 101, True), (101, 128, False), (128, 129, True):
        for step, cache, rows in zip((ours, plain), caches, logits):
            rows.append(step([Segment(cache, start, ids[start:stop], sampled)], range(stop - start)))
    a, b = (torch.cat(rows) for rows in logits)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(torch.tensor([ids[:129]]))[0][0]
    assert (a - b).abs().mean() < {"float32": 2e-6, "int8": 2e-2}.get(dtype, 5e-5)  # int8 rounds an input elsewhere, now and then
    assert (a - exact).abs().mean() < 1.1 * (b - exact).abs().mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_of_int8_products_overflows(sign):
    model = tiny_gpt(n_embd=64)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.fill_(sign)  # rounded to 127 each, four products would need 17 bits
    ours, plain = native.make_forward(model, "int8"), Forward(model, "int8")
    ids = list(range(16))
    a, b = (step([Segment(step.new_cache(), 0, ids)], range(16)) for step in (ours, plain))
    assert ours.backend == "by native.cpp" and (a - b).abs().mean() < 2e-2


def test_torch_steps_where_the_native_step_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)  # what was compiled before is forgotten
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native.make_forward(tiny_gpt(n_head=4), "int8").backend.endswith("the head size is not a multiple of 8")
    prompts = {"prompt": [3, 1, 4], "max_new_tokens": 12, "temperature": 0}
    expected = ids_of(wide_engine(), **prompts)
    assert len(list(tmp_path.glob("cache/*/native-*.so"))) == 1, "compiled once, into the cache folder"
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
    native.SOURCE.write_text("no C++")
    assert native.make_forward(tiny_gpt(), "int8").backend.endswith("g++ cannot compile it")
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = wide_engine()
    assert ids_of(engine, **prompts) == expected and engine.forward.backend.endswith("g++ is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(native.SOURCE))
    assert ids_of(wide_engine(), **prompts) == expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native.make_forward(tiny_gpt(), "int8").backend.endswith("this CPU has no AVX2")


@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.inference_mode()
def test_rows_of_a_product_do_not_depend_on_each_other(dtype):
    torch.manual_seed(0)
    for width in 16, 18, 64, 192:
        with torch.inference_mode(False):
            model = pack_model(tiny_gpt(vocab_size=1000, n_layer=1, n_embd=width), dtype)
        inner = torch.randn(300, 4 * width) * torch.logspace(-3, 3, 300)[:, None]
        mlp, outer = model.transformer.h[0].mlp, inner[:, :width].contiguous()
        for layer, x in (model.logits, outer), (mlp.c_fc, outer), (mlp.c_proj, inner), (mlp.act, inner):
            rows = layer(x)
            for some in (1, 2, 3, 4, 5, 7, 8, 24, 31, 32, 33, 44, 64, 100, 128, 299):
                assert torch.equal(layer(x[-some:].clone()), rows[-some:]), (layer, some)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_cached_beginning_changes_nothing(dtype, native):
    engine, fresh = wide_engine(dtype, native=native), wide_engine(dtype, native=native, prefix_bytes=0)
    prompt = (torch.arange(140) * 7 % 30).tolist()
    follow_up = prompt[:100] + ids_of(engine, prompt[:100], max_new_tokens=30, seed=1)
    for beginning in (prompt[:100], prompt[:100], prompt, prompt[:77], [*prompt[:70], 5, 5, 5], follow_up, prompt[:1]):
        logprobs = [[event for _, event in e.submit(beginning, max_new_tokens=9, seed=3, logprobs=30)] for e in (engine, fresh)]
        assert logprobs[0] == logprobs[1], "bit for bit"


@pytest.mark.parametrize("native", [True, False])
def test_a_prompt_seen_before_costs_one_short_step(native):
    engine, rows = wide_engine(native=native), []

    def counted(segments, wanted):
        rows.append(sum(len(segment.ids) for segment in segments))
        return plain(segments, wanted)

    plain, engine.scheduler.forward = engine.scheduler.forward, counted
    counted.new_cache = plain.new_cache
    prompt = list(range(30)) * 4
    for beginning, computed in ((prompt, 120), (prompt, 1), (prompt[:90], 1), ([*prompt[:90], 7, 7], 2)):
        rows.clear()
        ids_of(engine, beginning, max_new_tokens=1)
        assert sum(rows) == computed
    text = prompt + ids_of(engine, prompt, max_new_tokens=20)
    rows.clear()
    ids_of(engine, text, max_new_tokens=1)
    assert sum(rows) == (1 if native else 20), "torch's attention of one row is not bit for bit that of a prompt"


def test_the_store_forgets_the_oldest_and_keeps_to_its_bytes():
    engine = wide_engine(prefix_bytes=3 * 64 * 2 * 2 * 64 * 4)  # three chunks of two layers of keys and values
    for i in range(6):
        ids_of(engine, [i] * 40, max_new_tokens=1)
    assert [entry[0] for entry, _ in engine.scheduler.prefixes.entries] == [3, 4, 5]


def test_a_long_prompt_does_not_stall_who_is_writing():
    engine, steps = wide_engine(block_size=1024), []

    def counted(segments, wanted):
        steps.append(([len(segment.ids) for segment in segments if segment.sampled],
                      sum(len(segment.ids) for segment in segments if not segment.sampled)))
        return plain(segments, wanted)

    plain, engine.scheduler.forward = engine.scheduler.forward, counted
    counted.new_cache = plain.new_cache
    writer = engine.submit([1, 2], max_new_tokens=10**9)
    next(iter(writer.events.get, None))
    list(engine.submit((torch.arange(1000) % 30).tolist(), max_new_tokens=1))
    writer.cancel()
    with_prompt = [(sampled, prompt) for sampled, prompt in steps if prompt > 2]
    assert len(with_prompt) >= 1000 // scheduler.CHUNK, "a chunk of the prompt at a time"
    assert all(sampled == [1] and prompt <= scheduler.CHUNK for sampled, prompt in with_prompt), "and a token of the other"


def test_who_leaves_leaves_at_once_and_who_waits_comes_in():
    engine = wide_engine(max_running=2)
    requests = [engine.submit([i], max_new_tokens=100_000) for i in range(4)]
    for request in requests[:2]:
        next(iter(request))  # and its iterator's end is the reader's leaving
    for request in requests[2:]:
        assert isinstance(next(iter(request))[1], Token)
    engine.scheduler.thread.join(30)
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_past_the_bounds_it_is_busy_with_the_place_in_the_queue():
    engine = wide_engine(max_running=1, max_waiting=2, deadline_s=3.0)
    requests = [engine.submit([i], max_new_tokens=10**9) for i in range(3)]
    requests[1].deadline += 60  # it is being written when the third's time is over
    with pytest.raises(Busy, match="number 3 in the queue"):
        engine.submit([9])
    while not engine.scheduler.running:
        time.sleep(0.01)
    assert [request.queue_position() for request in requests] == [0, 1, 2]
    assert list(requests[0])[-1] == (0, "deadline")
    with pytest.raises(Busy, match="after 3 s this was still number"):
        list(requests[2])
    requests[1].cancel()


def test_all_who_write_get_on_alike():
    engine = wide_engine(max_running=8)
    requests = [engine.submit([i], max_new_tokens=10**9) for i in range(8)]
    while min(request.events.qsize() for request in requests) < 50:
        time.sleep(0.01)
    made = [text.generated for text in engine.scheduler.running]
    for request in requests:
        request.cancel()
    assert max(made) - min(made) <= 8, "they came in one after another, and step together"


def test_an_engine_in_many_threads_and_its_thread_ends(char_engine, monkeypatch):
    monkeypatch.setattr(scheduler, "IDLE_S", 0.05)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: char_engine.generate("the ", seed=i % 2, max_new_tokens=20)[0], range(16)))
    assert texts == texts[:2] * 8
    thread = char_engine.scheduler.thread
    assert thread is None or (not thread.join(5) and not thread.is_alive())
    assert char_engine.generate("the ", seed=0, max_new_tokens=20)[0] == texts[0]


# ----------------------------------------------------------------------------------------------------------------
# Stop strings

def test_a_stop_string_ends_the_text_and_is_never_shown(char_engine):
    free = char_engine.generate("the ", max_new_tokens=60, seed=4)[0]
    for stop in (free[0], free[7:9], free[20:25], "never ", ("#", free[30:33])):
        pieces = list(char_engine.stream("the ", max_new_tokens=60, seed=4, stop=stop))
        places = [free.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in free]
        assert "".join(pieces) == free[:min(places, default=60)], stop


def test_a_quota_and_not_the_host_says_how_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert devices.allowed_cores() == 64
    for content, cores in (("max 100000\n", 64), ("200000 100000\n", 2), ("150000 100000\n", 2), ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(content)
        assert devices.allowed_cores() == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert devices.allowed_cores() == 3


# ----------------------------------------------------------------------------------------------------------------
# The distribution

def drawn(logits, draws=20_000, **options):
    """Shares of each id among many evenly spread draws."""
    ids = [sample(logits.numpy(), (i + 0.5) / draws, **options) for i in range(draws)]
    return torch.bincount(torch.tensor(ids), minlength=logits.size(-1)) / draws


@pytest.mark.parametrize("size", [20, 64, 500])
def test_draws_follow_the_softmax_at_any_temperature(size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.0):
        torch.testing.assert_close(drawn(logits, temperature=temperature), (logits / temperature).softmax(-1), atol=1e-3, rtol=0)


OPTIONS = [{"top_k": 1}, {"top_k": 5}, {"top_k": 5000}, {"top_p": 0.01}, {"top_p": 0.6}, {"top_p": 0.97}, {"top_p": 0.9999},
           {"top_k": 8, "top_p": 0.7}, {"top_k": 700, "top_p": 0.9}, {"temperature": 0.6, "top_k": 40, "top_p": 0.95}]


@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_kept_and_how_likely_is_what_transformers_keeps(options, size):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    kept = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits)
    if "top_k" in options:
        kept = TopKLogitsWarper(min(options["top_k"], size))(None, kept)
    if "top_p" in options:
        kept = TopPLogitsWarper(options["top_p"])(None, kept)
    weights, ids = weigh(logits[0].numpy(), **{"temperature": 1.0, **options})
    ours = torch.zeros(size)
    ours[torch.arange(size) if ids is None else ids] = torch.tensor(weights)
    torch.testing.assert_close(ours / ours.sum(), kept.softmax(-1)[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS[1::3])
def test_draws_follow_what_is_kept(options):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    weights, ids = weigh(logits.numpy(), **{"temperature": 1.0, **options})
    expected = torch.zeros(50)
    expected[ids] = torch.tensor(weights / weights.sum())
    torch.testing.assert_close(drawn(logits, **options), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits, ids = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)), [3, 7, 7, 3, 49]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())[0]
    torch.testing.assert_close(torch.tensor(penalize(logits[0].numpy(), set(ids), penalty)), theirs)


def test_the_penalty_counts_prompt_and_sampled_tokens(char_engine):
    text = ids_of(char_engine, [1, 2, 3], temperature=0, repetition_penalty=1e6, max_new_tokens=13)
    assert len({1, 2, 3, *text}) == 16, "no token twice while there are others"


def test_temperature_0_takes_the_likeliest():
    for logits in torch.randn(6, 50, generator=torch.Generator().manual_seed(2)):
        assert sample(logits.numpy(), 0.99, temperature=0) == logits.argmax()


def test_a_draw_at_the_edges_is_of_a_token_that_can_be_drawn():
    logits = torch.full((130,), -math.inf)
    logits[[5, 77]] = 0.0
    assert [sample(logits.numpy(), uniform) for uniform in (0.0, 0.49, 0.51, 1 - 2**-53)] == [5, 5, 77, 77]


# ----------------------------------------------------------------------------------------------------------------
# Scoring

def test_scores_are_the_models_log_probabilities(gpt2_engine):
    ids = gpt2_engine.tokenizer.encode("The fox went out")
    scores = gpt2_engine.score("The fox went out")
    with torch.no_grad():
        logprobs = gpt2_engine.model(torch.tensor([[50256, *ids]]))[0][0, :, :50257].log_softmax(-1)
    assert scores == pytest.approx([logprobs[i, token].item() for i, token in enumerate(ids)], abs=1e-4)


def test_without_end_of_text_the_first_token_has_no_score(char_engine):
    scores = char_engine.score("abc")
    assert scores[0] is None and all(score < 0 for score in scores[1:])
    assert char_engine.score("") == []


def test_a_long_text_is_scored_with_at_least_half_a_context_before_each_token(char_engine):
    text = "the fox went out on a chilly night and prayed for the moon to give him light"
    ids, scores = char_engine.tokenizer.encode(text), char_engine.score(text)
    assert len(scores) == len(ids)
    for i in range(1, len(ids)):
        start = 0 if i <= 16 else i - 8 - (i - 17) % 9  # windows of 16 that score 9 new tokens each
        with torch.no_grad():
            logits = char_engine.model(torch.tensor([ids[start:i]]))[0][0, -1, :char_engine.tokenizer.vocab_size]
        assert scores[i] == pytest.approx(logits.log_softmax(-1)[ids[i]].item(), abs=1e-4), i


def test_inspect_shows_the_likeliest_alternatives(char_engine):
    tokens = char_engine.inspect("the fox", top=3)
    assert "".join(token["text"] for token in tokens) == "the fox"
    for token in tokens[1:]:
        best = [p for _, p in token["top"]]
        assert len(best) == 3 and best == sorted(best, reverse=True) and token["logprob"] <= best[0] + 1e-6


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision_writes(dtype):
    model = tiny_gpt()
    engine = Engine(model, CharTokenizer("\n abc"), dtype)
    assert engine.dtype == dtype and len(engine.generate("abc", max_new_tokens=30)[0]) == 30
    assert next(model.parameters()).dtype == torch.float32


def test_auto_is_a_rule_of_the_models_size(monkeypatch):
    assert Engine(tiny_gpt(), CharTokenizer("abc")).dtype == "float32"
    monkeypatch.setattr(generate, "LARGE_MODEL", 1000)
    assert Engine(tiny_gpt(), CharTokenizer("abc")).dtype == "int8"


# ----------------------------------------------------------------------------------------------------------------
# The command line

def test_a_seed_prints_the_same_texts_each_time(command):
    once, again = (command("generate.py", "-m", "bundled:shakespeare", "-p", "ROMEO:", "-n", 3, "--seed", 42).stdout
                   for _ in range(2))
    assert once == again
    texts = once.removesuffix("\n").split("\n--------\n")
    assert len(set(texts)) == 3 and all(text.startswith("ROMEO:") and len(text) == len("ROMEO:") + 256 for text in texts)


def test_without_a_prompt_it_asks_for_prompts(command):
    done = command("generate.py", "-m", "bundled:shakespeare", "--seed", 1, "--max-new-tokens", 20, typed="ROMEO:\nЯ\n")
    assert re.fullmatch(r"\n> ROMEO:[^Я]{20}\n\n> Я[^Я]{20}\n\n> \n", done.stdout), done.stdout
    assert "alphabet lacks" in done.stderr and done.stderr.count("seed 1") == 2


def test_a_file_or_the_standard_input_is_a_prompt_and_json_says_all(command, tmp_path):
    (tmp_path / "beginning.txt").write_text("ROMEO:\nWhat")
    options = ["-m", "bundled:shakespeare", "--seed", 3, "--max-new-tokens", 40]
    plain = command("generate.py", *options, "--file", "beginning.txt").stdout
    assert plain == command("generate.py", *options, "--file", "-", typed="ROMEO:\nWhat").stdout
    lines = command("generate.py", *options, "--file", "beginning.txt", "-n", 2, "--json", "--stop", "\\n").stdout.splitlines()
    samples = [json.loads(line) for line in lines]
    first = plain.removeprefix("ROMEO:\nWhat").removesuffix("\n")
    assert samples[0]["text"] == first.partition("\n")[0] and samples[0]["prompt"] == "ROMEO:\nWhat"
    assert [sample["index"] for sample in samples] == [0, 1] and samples[0]["seed"] == 3
    assert samples[0]["finish_reason"] == ("stop" if "\n" in first else "length")


@pytest.mark.parametrize("arguments, sentence", [
    (["--temperature", -1], "temperature must be 0 or more"), (["--max-new-tokens", -5], "max_new_tokens must be 0 or more"),
    (["-m", "bundled:none"], "no bundled model"), (["-m", "no/such/model"], "no file, folder or run"),
    (["--device", "abacus"], "no device")])
def test_bad_input_gets_one_sentence(arguments, sentence):
    config = tyro.cli(generate.GenerateConfig, args=["-p", "x", *map(str, arguments)])
    with pytest.raises(UserError, match=sentence):
        generate.main(config)
