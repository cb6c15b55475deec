"""Other people's programs on our files, and ours on theirs. requirements-interop.txt names them; a test skips without its own."""
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
    """Opens a model of ours in llama.cpp, with a float32 cache: llama(gpt, tokenizer, dtype)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = []

    def open_there(gpt, tokenizer, dtype):
        save_gguf(tmp_path / "model.gguf", gpt, tokenizer, dtype)
        opened.append(llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=gpt.config.block_size, logits_all=True, verbose=False,
                                      n_threads=1, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32))
        return opened[-1]

    yield open_there
    for model in opened:
        model.close()


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("float16", 0.03), ("bfloat16", 0.15), ("q8_0", 0.4)])
def test_llama_cpp_reads_the_tokens_and_computes_the_logits_that_we_do(llama, kind, dtype, tolerance):
    tokenizer = load_tokenizer("gpt2") if kind == "gpt2" else small_bpe()
    gpt = tiny_gpt(vocab_size=tokenizer.vocab_size + 47, block_size=256, n_embd=64)
    there, ids = llama(gpt, tokenizer, dtype), tokenizer.encode(TEXT)
    assert there.tokenize(TEXT.encode(), add_bos=False, special=False) == ids
    assert there.detokenize(ids).decode() == TEXT
    assert there.token_eos() == tokenizer.eot
    there.eval(ids)
    logits = torch.from_numpy(np.array(there.scores[:len(ids)]))  # (T, V)
    ours = gpt(torch.tensor([ids]))[0][0, :, :tokenizer.vocab_size]
    assert (logits - ours).abs().max() < tolerance


def test_llama_cpp_writes_the_greedy_text_that_we_do(llama):
    """Until our two best logits lie closer than 0.01: its GELU is a table in float16."""
    gpt, tokenizer = tiny_gpt(vocab_size=300, block_size=256, n_embd=64), small_bpe()
    there, compared = llama(gpt, tokenizer, "float32"), 0
    for prompt in "The fox", "and prayed", "he had many a mile":
        ids = tokenizer.encode(prompt)
        theirs = there.generate(list(ids), temp=0, repeat_penalty=1.0, reset=True)
        for _ in range(60):
            first, second = gpt(torch.tensor([ids]))[0][0, -1].topk(2).values.tolist()
            if first - second < 0.01:
                break
            ids.append(gpt(torch.tensor([ids]))[0][0, -1].argmax().item())
            assert next(theirs) == ids[-1]
            compared += 1
    assert compared > 60


def test_allenporters_program_writes_a_folder_that_opens_here(tmp_path):
    nano_gpt = pytest.importorskip("nano_gpt.model")
    from nano_gpt.checkpoint import Checkpoint, export_checkpoint  # noqa: PLC0415
    from nano_gpt.config import GPTConfig, TrainConfig  # noqa: PLC0415

    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    theirs = nano_gpt.GPT(config, tokenizer=None).eval()
    state = {f"_orig_mod.{name}": w + 0.05 * torch.randn_like(w) for name, w in theirs.state_dict().items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"].clone()
    theirs.load_state_dict({name.removeprefix("_orig_mod."): w for name, w in state.items()})
    train_config = TrainConfig(total_batch_size=2**15, micro_batch_size=1, step=18_000)
    (tmp_path / "x.pt").write_bytes(b"its size is compared")
    export_checkpoint(Checkpoint(model_state_dict=state, config=config, train_config=train_config, dataset_config=None,
                                 eval_config=None, sample_config=None, val_loss_accum=3.05), tmp_path / "x.pt", tmp_path / "out")
    ours, tokenizer, info = checkpoint.load_model(tmp_path / "out")
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0], atol=1e-4, rtol=0)
    assert tokenizer.kind == "gpt2" and math.isclose(info["val_loss"], 3.05) and info["train_config"]["step"] == 18_000
