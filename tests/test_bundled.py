import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint import BUNDLED, list_bundled, load_model
from generate import Engine

PROMPTS = {"edu": "The history of the", "pushkin": "Я вас любил: любовь ещё"}
MEGABYTES = {"edu": 25, "pushkin": 4, "shakespeare": 4}


@pytest.mark.parametrize("name", list_bundled())
def test_transformers_writes_what_a_bundled_model_writes_here(name):
    prompt = PROMPTS.get(name, "ROMEO:\nBut soft")
    model, tokenizer, info = load_model(f"bundled:{name}")
    ours = Engine(model, tokenizer, "float32").generate(prompt, temperature=0, max_new_tokens=100)[0]
    their_tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
    their_model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype="float32")
    ids = their_model.generate(**their_tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=100)
    assert their_tokenizer.decode(ids[0], skip_special_tokens=True) == prompt + ours
    assert info["parameters"] == sum(p.numel() for p in their_model.parameters())


@pytest.mark.parametrize("name", list_bundled())
def test_a_bundled_model_is_small_and_says_how_it_was_made(name):
    assert (BUNDLED / name / "model.safetensors").stat().st_size <= MEGABYTES[name] * 1e6
    readme = (BUNDLED / name / "README.md").read_text(encoding="utf-8")
    assert f"python train.py {name}-bundled" in readme and "Not measured yet" not in readme
