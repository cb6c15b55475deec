"""Other programs read our files, and we read theirs.

requirements-interop.txt lists these programs. A test is skipped if its program is not installed.
"""
import math

import numpy as np
import pytest
import torch
from conftest import small_bpe, tiny_gpt

import checkpoint
from tokenizer import load_tokenizer
from weights.gguf import save_gguf

TEXT = "Hello, I'm a language model, naïve 🦊\n\n   and <|endoftext|>"


@pytest.fixture
def llama(tmp_path):
    """llama(gpt, tokenizer, dtype) opens our model in llama.cpp, with a float32 KV cache."""
    llama_cpp = pytest.importorskip("llama_cpp")
    models = []

    def open_in_llama(gpt, tokenizer, dtype):
        path = tmp_path / "model.gguf"
        save_gguf(path, gpt, tokenizer, dtype)
        models.append(llama_cpp.Llama(
            str(path), n_ctx=gpt.config.block_size, logits_all=True, verbose=False, n_threads=1,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32))
        return models[-1]

    yield open_in_llama
    for model in models:
        model.close()


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize(("dtype", "tolerance"), [
    ("float32", 0.01), ("float16", 0.03), ("bfloat16", 0.15), ("q8_0", 0.4)])
def test_llama_cpp_computes_our_tokens_and_our_logits(llama, kind, dtype, tolerance):
    tokenizer = load_tokenizer("gpt2") if kind == "gpt2" else small_bpe()
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 47, block_size=256, n_embd=64)
    theirs = llama(gpt, tokenizer, dtype)
    ids = tokenizer.encode(TEXT)
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=False) == ids
    assert theirs.detokenize(ids).decode() == TEXT
    assert theirs.token_eos() == tokenizer.eot
    theirs.eval(ids)
    their_logits = torch.from_numpy(np.array(theirs.scores[:len(ids)]))  # (T, V)
    our_logits = gpt(torch.tensor([ids]))[0][0, :, :tokenizer.vocab_size]
    assert (their_logits - our_logits).abs().max() < tolerance


def test_llama_cpp_generates_our_greedy_text(llama):
    """Up to a near tie, where our two largest logits differ by less than 0.01.

    llama.cpp looks GELU up in a float16 table.
    """
    gpt, tokenizer = tiny_gpt(vocab_size=300, block_size=256, n_embd=64), small_bpe()
    theirs = llama(gpt, tokenizer, "float32")
    compared = 0
    for prompt in "The fox", "and prayed", "he had many a mile":
        ids = tokenizer.encode(prompt)
        their_ids = theirs.generate(list(ids), temp=0, repeat_penalty=1.0, reset=True)
        for _ in range(60):
            logits = gpt(torch.tensor([ids]))[0][0, -1]
            first, second = logits.topk(2).values.tolist()
            if first - second < 0.01:
                break
            ids.append(logits.argmax().item())
            assert next(their_ids) == ids[-1]
            compared += 1
    assert compared > 60


def test_a_folder_that_allenporters_nano_gpt_exports_opens_here(tmp_path):
    nano_gpt = pytest.importorskip("nano_gpt.model")
    from nano_gpt.checkpoint import Checkpoint, export_checkpoint  # noqa: PLC0415
    from nano_gpt.config import GPTConfig, TrainConfig  # noqa: PLC0415

    # a checkpoint of their program, with the names of a compiled model
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    theirs = nano_gpt.GPT(config, tokenizer=None).eval()
    state = {name: w + 0.05 * torch.randn_like(w) for name, w in theirs.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    theirs.load_state_dict(state)
    compiled_state = {f"_orig_mod.{name}": w for name, w in state.items()}
    train_config = TrainConfig(total_batch_size=2**15, micro_batch_size=1, step=18_000)
    (tmp_path / "x.pt").write_bytes(b"export_checkpoint reads this file's size")
    export_checkpoint(
        Checkpoint(model_state_dict=compiled_state, config=config, train_config=train_config,
                   dataset_config=None, eval_config=None, sample_config=None, val_loss_accum=3.05),
        tmp_path / "x.pt", tmp_path / "out")

    ours, tokenizer, info = checkpoint.load_model(tmp_path / "out")
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0], atol=1e-4, rtol=0)
    assert tokenizer.kind == "gpt2"
    assert math.isclose(info["val_loss"], 3.05) and info["train_config"]["step"] == 18_000
