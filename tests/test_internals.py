"""What a model computes inside: attention, logit lens and direct logit attribution."""
import math

import pytest
import torch
from conftest import tiny_gpt

from checkpoint import load_model
from engine.internals import trace_tokens
from model import GPT, GPTConfig


@pytest.fixture(params=["random", "gpt2-shaped", "bundled"])
def traced(request):
    """(model, its logits (T, V), its trace)."""
    if request.param == "bundled":
        model, tokenizer, _ = load_model("bundled")
        ids = tokenizer.encode("Once upon a time, there was a little fox who lived in a wood.")
    else:
        sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32} if request.param == "random" else {
            "n_layer": 2, "n_head": 12, "n_embd": 768}
        model = tiny_gpt(vocab_size=90, block_size=32, **sizes)
        ids = torch.randint(90, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0]
    return model, logits, trace_tokens(model, ids)


def test_the_lens_of_the_last_layer_gives_the_logits_of_the_model(traced):
    _, logits, trace = traced
    rows = list(range(len(logits)))
    lens = trace.lens(rows)
    assert lens.shape == (len(trace.mlp) + 1, *logits.shape)
    torch.testing.assert_close(lens[-1], logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(trace.lens([-1])[:, 0], lens[:, -1], atol=1e-3, rtol=1e-4)


def test_the_lens_of_an_earlier_layer_gives_the_logits_of_the_model_cut_there(traced):
    model, _, trace = traced
    kept = len(model.transformer.h) - 1
    del model.transformer.h[kept:]
    with torch.no_grad():
        logits = model(torch.tensor([trace.ids]))[0][0, -1]
    torch.testing.assert_close(trace.lens([-1])[kept, 0], logits, atol=1e-3, rtol=1e-4)


def test_contributions_add_up_to_the_logit(traced):
    model, logits, trace = traced
    wte = model.transformer.wte.weight.detach()
    for row, token in (0, 5), (7, 0), (-1, int(logits[-1].argmax())):
        parts = trace.contributions(row, wte[token])
        assert parts.heads.shape == trace.attention.shape[:2]
        assert parts.total() == pytest.approx(logits[row, token].item(), abs=2e-3)
        difference = trace.contributions(row, wte[token] - wte[3]).total()
        expected = (logits[row, token] - logits[row, 3]).item()
        assert difference == pytest.approx(expected, abs=2e-3)


def test_a_contribution_is_what_the_logit_loses_without_that_part():
    """Removing a part of the last layer takes its contribution away, the final scale frozen."""
    model = tiny_gpt(vocab_size=90, block_size=32, n_layer=2, n_head=4, n_embd=32)
    ids = [3, 1, 4, 1, 5, 9]
    trace = trace_tokens(model, ids)
    wte, ln_f = model.transformer.wte.weight, model.transformer.ln_f
    parts = trace.contributions(-1, wte[7])

    def logit(x):
        """The logit with the scale of ln_f frozen."""
        scale = (trace.residual[-1, -1].var(correction=0) + ln_f.eps).rsqrt()
        return (((x - x.mean()) * scale) * ln_f.weight + ln_f.bias) @ wte[7]

    x, c_proj = trace.residual[-1, -1], model.transformer.h[1].attn.c_proj
    without_mlp = x - trace.mlp[1, -1]
    only_one_head = torch.zeros(4, 8)
    only_one_head[2] = trace.heads[1, 2, -1]
    without_head = x - c_proj.weight @ only_one_head.flatten()
    assert parts.mlp[1].item() == pytest.approx((logit(x) - logit(without_mlp)).item(), abs=1e-4)
    assert parts.heads[1, 2].item() == pytest.approx(
        (logit(x) - logit(without_head)).item(), abs=1e-4)


def test_attention_is_the_softmax_of_the_past_and_its_rows_sum_to_one(traced):
    model, _, trace = traced
    T = len(trace.ids)
    torch.testing.assert_close(trace.attention.sum(-1), torch.ones(*trace.attention.shape[:3]))
    assert not trace.attention.triu(1).any()
    # compute one layer plainly, a head and a row at a time
    block = model.transformer.h[-1]
    C = model.config.n_embd
    hs = C // model.config.n_head
    with torch.no_grad():
        q, k, _ = block.attn.c_attn(block.ln_1(trace.residual[-2])).split(C, dim=-1)  # (T, C)
    for head in range(model.config.n_head):
        columns = slice(head * hs, (head + 1) * hs)
        for row in 0, T // 2, T - 1:
            scores = k[:row + 1, columns] @ q[row, columns] / math.sqrt(hs)
            torch.testing.assert_close(trace.attention[-1, head, row, :row + 1],
                                       scores.softmax(-1), atol=1e-5, rtol=1e-4)


def test_tracing_leaves_the_model_as_it_was():
    model = GPT(GPTConfig(16, 40, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    model.train()
    first = trace_tokens(model, [1, 2, 3])
    torch.testing.assert_close(first.residual, trace_tokens(model, [1, 2, 3]).residual)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert first.model is model
    with pytest.raises(ValueError, match="exceed the model's context"):
        trace_tokens(model, [1] * 17)
