"""The models in assets/bundled."""
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
from checkpoint import BUNDLED, find_model, list_bundled, load_model
from generate import Engine

PROMPTS = {"stories": "Once upon a time", "chat": "Hello", "edu": "The history of the",
           "pushkin": "Я вас любил: любовь ещё"}
MEGABYTES = {"edu": 25, "pushkin": 4, "shakespeare": 4}


@pytest.mark.parametrize("name", list_bundled())
def test_transformers_generates_the_same_text_as_our_engine(name):
    prompt = PROMPTS.get(name, "ROMEO:\nBut soft")
    model, tokenizer, info = load_model(f"bundled:{name}")
    engine = Engine(model, tokenizer, "float32")
    ours = engine.generate(prompt, temperature=0, max_new_tokens=100)[0]
    their_tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name)
    their_model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype="float32")
    inputs = their_tokenizer(prompt, return_tensors="pt")
    ids = their_model.generate(**inputs, do_sample=False, max_new_tokens=100)
    assert their_tokenizer.decode(ids[0], skip_special_tokens=True) == prompt + ours
    assert info["parameters"] == sum(p.numel() for p in their_model.parameters())


@pytest.mark.parametrize("name", list_bundled())
def test_a_bundled_model_is_small_and_says_how_it_was_trained(name):
    size = (BUNDLED / name / "model.safetensors").stat().st_size
    assert size <= MEGABYTES.get(name, 25) * 1e6
    readme = (BUNDLED / name / "README.md").read_text(encoding="utf-8")
    assert f"python train.py {name}-bundled" in readme and "Not measured yet" not in readme


@pytest.mark.parametrize("names, expected", [
    (["chat", "edu", "pushkin", "shakespeare", "stories"],
     ["stories", "chat", "edu", "shakespeare", "pushkin"]),
    (["another", "edu", "pushkin", "zen"], ["edu", "pushkin", "another", "zen"]),
])
def test_the_first_bundled_model_is_the_default(names, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert list_bundled() == expected
    assert find_model("bundled") == tmp_path / expected[0]
