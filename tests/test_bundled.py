import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint import BUNDLED, list_bundled, load_model
from generate import Engine

PROMPT = "ROMEO:\nBut soft"


@pytest.mark.parametrize("name", list_bundled())
def test_transformers_writes_what_a_bundled_model_writes_here(name):
    model, tokenizer, info = load_model(f"bundled:{name}")
    ours = Engine(model, tokenizer, "float32").generate(PROMPT, temperature=0, max_new_tokens=100)[0]
    their_tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
    their_model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype="float32")
    ids = their_model.generate(**their_tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=100)
    assert their_tokenizer.decode(ids[0]) == PROMPT + ours
    assert info["parameters"] == sum(p.numel() for p in their_model.parameters())


def test_the_shakespeare_model_is_small_and_says_how_it_was_made():
    folder = BUNDLED / "shakespeare"
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert "python train.py shakespeare-bundled" in (folder / "README.md").read_text()
