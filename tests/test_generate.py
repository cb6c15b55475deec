import math
import re

import pytest
import torch
import tyro
from conftest import tiny_gpt
from transformers import TopKLogitsWarper, TopPLogitsWarper

import generate
from errors import UserError
from generate import Engine, sample
from tokenizer import CharTokenizer


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
    ids = [step[0] for step in char_engine.tokens(prompt, temperature=0, max_new_tokens=60)]
    assert ids == continue_plainly(char_engine, prompt, 60)


def test_cached_logits_are_the_uncached_ones(char_engine, monkeypatch):
    seen, plain = [], Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda self, x: seen.append(plain(self, x)) or seen[-1])
    ids = [3, *(step[0] for step in char_engine.tokens([3], max_new_tokens=15, seed=1))]
    with torch.no_grad():
        full = char_engine.model(torch.tensor([ids[:-1]]))[0][0, :, :char_engine.tokenizer.vocab_size]
    torch.testing.assert_close(torch.cat(seen), full, atol=1e-4, rtol=0)


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
    steps = list(gpt2_engine.tokens([15496], n=8, max_new_tokens=20, temperature=2.0, seed=0))
    assert max(i for step in steps for i in step if i is not None) < 50257


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


@pytest.mark.parametrize("option", [{"ids": []}, {"temperature": -0.1}, {"temperature": math.nan}, {"max_new_tokens": -1},
                                    {"n": 0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_values_out_of_range_get_one_sentence(char_engine, option):
    with pytest.raises(UserError):
        list(char_engine.tokens(**{"ids": [5], **option}))


# ----------------------------------------------------------------------------------------------------------------
# The distribution

def drawn(logits, draws=20_000, **options):
    """Shares of each id among many evenly spread draws."""
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    ids = sample(logits.expand(draws, -1), uniform, **options)
    return torch.bincount(ids, minlength=logits.size(-1)) / draws


def test_draws_follow_the_softmax_at_any_temperature():
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.0):
        torch.testing.assert_close(drawn(logits, temperature=temperature), (logits / temperature).softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 5}, {"top_k": 500}, {"top_p": 0.01}, {"top_p": 0.6},
                                     {"top_k": 8, "top_p": 0.7}])
def test_top_k_and_top_p_keep_what_those_of_transformers_keep(options):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    kept = logits
    if "top_k" in options:
        kept = TopKLogitsWarper(options["top_k"])(None, kept)
    if "top_p" in options:
        kept = TopPLogitsWarper(options["top_p"])(None, kept)
    torch.testing.assert_close(drawn(logits, **options), kept.softmax(-1)[0], atol=1e-3, rtol=0)


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sample(logits, torch.rand(6), temperature=0), logits.argmax(-1))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_writes(dtype):
    model = tiny_gpt()
    engine = Engine(model, CharTokenizer("\n abc"), dtype)
    assert engine.dtype == getattr(torch, dtype) and len(engine.generate("abc", max_new_tokens=30)[0]) == 30
    assert next(model.parameters()).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------
# The command line

def test_a_seed_prints_the_same_texts_each_time(command):
    once, again = (command("generate.py", "-m", "bundled", "-p", "ROMEO:", "-n", 3, "--seed", 42).stdout for _ in range(2))
    assert once == again
    texts = once.removesuffix("\n").split("\n--------\n")
    assert len(set(texts)) == 3 and all(text.startswith("ROMEO:") and len(text) == len("ROMEO:") + 256 for text in texts)


def test_without_a_prompt_it_asks_for_prompts(command):
    done = command("generate.py", "-m", "bundled", "--seed", 1, "--max-new-tokens", 20, typed="ROMEO:\nЯ\n")
    assert re.fullmatch(r"\n> ROMEO:[^Я]{20}\n\n> Я[^Я]{20}\n\n> \n", done.stdout), done.stdout
    assert "alphabet lacks" in done.stderr and done.stderr.count("seed 1") == 2


@pytest.mark.parametrize("arguments, sentence", [
    (["--temperature", -1], "temperature is 0 or above"), (["--max-new-tokens", -5], "cannot be negative"),
    (["-m", "bundled:none"], "no bundled model"), (["-m", "no/such/model"], "no file, folder or run"),
    (["--device", "abacus"], "no device")])
def test_bad_input_gets_one_sentence(arguments, sentence):
    config = tyro.cli(generate.GenerateConfig, args=["-p", "x", *map(str, arguments)])
    with pytest.raises(UserError, match=sentence):
        generate.main(config)
