"""The model equals transformers' GPT-2, has the papers' sizes, and starts with GPT-2's weights."""
import pytest
import torch
from conftest import tiny_gpt
from transformers import GPT2Config, GPT2LMHeadModel

import model
from common.errors import UserError
from engine.packed import pack_model
from model import GPT, SIZES, GPTConfig
from tokenizer import CharTokenizer
from training import loss as training_loss
from weights.huggingface import load_folder, save_huggingface, to_huggingface
from weights.state import normalize_names, transpose_conv1d

CONFIGS = [
    GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8),
    GPTConfig(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48),
    GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=3, n_embd=96, activation="gelu"),
]
SMALL = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 4}


# --------------------------------------------------------------------------------------------------
# Comparison with transformers

def transformers_model(config: GPTConfig) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, activation_function=config.activation,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def randomize(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_logits_and_gradients_are_those_of_transformers(config, direction):
    # the same weights in both models
    torch.manual_seed(0)
    ours, theirs = GPT(config).eval(), transformers_model(config)
    if direction == "theirs to ours":
        randomize(theirs)
        ours.load_state_dict(transpose_conv1d(normalize_names(theirs.state_dict())))
    else:
        randomize(ours)
        state = to_huggingface(ours.state_dict(), config.vocab_size)
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
    # the same logits
    idx = torch.randint(0, config.vocab_size, (3, config.block_size))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    # the same loss and gradients
    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    their_loss = theirs(idx, labels=idx).loss
    assert logits is None
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)
    loss.backward()
    their_loss.backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    their_grads = transpose_conv1d(normalize_names(their_grads))
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, their_grads[name], atol=1e-5, rtol=1e-3, msg=name)


def test_transformers_opens_our_folder_and_we_open_theirs(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=5, n_layer=2, n_head=2, n_embd=16)
    tokenizer = CharTokenizer("\n abc")
    idx = torch.randint(0, 5, (2, 16))

    ours = tiny_gpt(vocab_size=8)  # three padding ids, which are not exported
    save_huggingface(tmp_path / "ours", ours, tokenizer, torch.float32)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert theirs.config.vocab_size == 5
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :5], atol=1e-4, rtol=0)

    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    ours, _, _ = load_folder(tmp_path / "theirs")
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# Sizes

def test_gpt2_124m_has_its_published_number_of_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig()).num_parameters() == 124_439_808


# Parameter counts: GPT-2's from the released weights, GPT-3's from arXiv 2005.14165, table 2.1.
PUBLISHED = {
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6,
    "gpt3-small": 125e6, "gpt3-medium": 350e6, "gpt3-large": 760e6, "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13.0e9, "gpt3-175b": 175.0e9,
}


@pytest.mark.parametrize("name, published", PUBLISHED.items())
def test_every_size_has_the_parameters_that_its_paper_states(name, published):
    with torch.device("meta"):
        assert GPT(SIZES[name]).num_parameters() == pytest.approx(published, rel=0.02)


def test_every_published_size_has_a_name():
    assert set(SIZES) == set(PUBLISHED)


def test_flops_per_token_follow_the_palm_papers_formula():
    with torch.device("meta"):
        flops = GPT(GPTConfig()).flops_per_token(1024)
    assert flops == 6 * 124_439_808 + 12 * 12 * 12 * 64 * 1024


# --------------------------------------------------------------------------------------------------
# Construction

def test_initial_weights_are_gpt2s():
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.05), name  # 1 / sqrt(2 * 8)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            expected = torch.full_like(p, float(name.endswith("weight")))
            assert torch.equal(p, expected), name
    # the first loss is that of a uniform distribution
    idx = torch.randint(0, 512, (8, 128))
    loss = model(idx, idx.roll(-1, 1))[1].item()
    assert loss == pytest.approx(torch.tensor(512.0).log().item(), abs=0.1)


def test_a_config_may_be_a_mapping():
    assert GPT(SMALL).config == GPTConfig(8, 16, 1, 1, 4)


@pytest.mark.parametrize("change", [
    {"n_head": 5}, {"n_layer": 0}, {"dropout": 1.0}, {"activation": "relu"}, {"n_embd": "4"}])
def test_an_invalid_config_raises_a_user_error(change):
    with pytest.raises(UserError):
        GPT({**SMALL, **change})


# --------------------------------------------------------------------------------------------------
# Variants that must compute the same

@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
                    reason="torch was built without oneDNN, as for Macs")
def test_a_packed_model_computes_what_the_model_does_and_leaves_it_unchanged():
    model = tiny_gpt(vocab_size=100, n_embd=32)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    idx = torch.randint(100, (3, 16))
    packed = pack_model(model)
    torch.testing.assert_close(packed(idx)[0], model(idx)[0], atol=1e-4, rtol=0)
    assert packed is not model
    assert packed.transformer.wte.weight is model.transformer.wte.weight
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(w, before[name]) for name, w in after.items())
    assert pack_model(model.bfloat16()) is model  # only float32 models are packed


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("tokens", [33, 48])
def test_the_chunked_loss_equals_the_loss_of_all_logits_at_once(monkeypatch, tokens, bfloat16):
    monkeypatch.setitem(training_loss.LOGIT_ROWS, "cpu", 16)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 8), torch.randn(100, 8)
    targets = torch.randint(100, (tokens,))
    results = []
    for rows in 16, 1000:
        training_loss.LOGIT_ROWS["cpu"] = rows
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.cross_entropy(leaves[0] * 1, leaves[1], targets)
            (loss * 0.5).backward()
            with torch.no_grad():
                without_grad = model.cross_entropy(x, weight, targets).item()
                assert without_grad == pytest.approx(loss.item(), abs=1e-6)
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    tolerance = {"atol": 5e-3, "rtol": 2e-2} if bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    for chunked, at_once in zip(*results):
        torch.testing.assert_close(chunked, at_once, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(dropout):
    gpt = tiny_gpt(dropout=dropout).train()
    x = torch.randint(32, (3, 16))
    gradients = []
    for gpt.recompute in False, True:
        torch.manual_seed(1)
        gpt(x, x)[1].backward()
        gradients.append([p.grad.clone() for p in gpt.parameters()])
        gpt.zero_grad()
    for stored, recomputed in zip(*gradients):
        assert torch.equal(stored, recomputed)
