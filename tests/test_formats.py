"""Everyone's GPT-2 comes in: each layout is made here as its own program writes it."""
import copy
import dataclasses
import io
import json
import pickle
import shutil
import sys
import types
import zipfile

import pytest
import tokenizers
import torch
from conftest import PROSE, tiny_gpt
from safetensors.torch import load_file, save_file

import checkpoint
import publish
from common.errors import UserError
from common.files import write_atomically
from model import GPT
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from weights.huggingface import save_huggingface, to_huggingface

SIZES = {"block_size": 16, "vocab_size": 50304, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture
def gpt():
    return tiny_gpt(vocab_size=50304)


def same(name, gpt: GPT, tokens=50257, **changes) -> dict:
    """Checks that the model called `name` computes what `gpt` does, and returns what is known of it."""
    model, tokenizer, info = checkpoint.load_model(name)
    x = torch.arange(12)[None] % gpt.config.vocab_size
    expected = GPT(dataclasses.replace(gpt.config, **changes))
    expected.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(x)[0][..., :tokens], expected.eval()(x)[0][..., :tokens], atol=1e-5)
    assert tokenizer.vocab_size == tokens
    return info


def test_allenporters_layout(gpt, tmp_path):
    """Hugging Face's orientation, block_size for n_positions, no tokenizer; its training stays known."""
    weights = to_huggingface(gpt.state_dict(), 50304)
    save_file({name: w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 16, **SIZES, "val_loss_accum": 3.05,
        "train_config": {"step": 18_000, "max_lr": 6e-4}}))
    info = same(tmp_path, gpt)
    assert info["train_config"]["step"] == 18_000 and info["val_loss"] == 3.05


def test_samkeets_layout(gpt, tmp_path):
    """nn.Linear's orientation under `model.`, with the head beside the embedding."""
    weights = {f"model.{name}": w.clone() for name, w in gpt.state_dict().items()}
    weights["model.lm_head.weight"] = weights["model.transformer.wte.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom_gpt", **SIZES}))
    same(tmp_path, gpt)
    weights["model.lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head is not tied"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2model_without_prefix_with_masks_and_in_several_files(gpt, tmp_path, dtype):
    save_huggingface(tmp_path, gpt, load_tokenizer("gpt2"), torch.float32)
    weights = {name.removeprefix("transformer."): w.to(dtype) for name, w in load_file(tmp_path / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    names, index = sorted(weights), {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, tmp_path / file)
        index |= dict.fromkeys(names[i::2], file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if dtype == torch.float32:
        same(tmp_path, gpt)
    else:
        checkpoint.load_model(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="has no model-00002"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(UserError, match="not a complete model folder"):
        checkpoint.load_model(tmp_path)


@pytest.fixture
def pickled_config(monkeypatch):
    """A GPTConfig of a program called train_gpt2, as build-nanogpt's checkpoints hold it."""
    program = types.ModuleType("train_gpt2")
    program.GPTConfig = dataclasses.make_dataclass("GPTConfig", SIZES)
    program.GPTConfig.__module__ = "train_gpt2"
    monkeypatch.setitem(sys.modules, "train_gpt2", program)
    return program.GPTConfig


def test_build_nanogpts_checkpoint(gpt, tmp_path, pickled_config):
    state = {f"_orig_mod.module.{name}": w for name, w in gpt.state_dict().items()}
    state["_orig_mod.module.lm_head.weight"] = gpt.state_dict()["transformer.wte.weight"]
    torch.save({"model": state, "config": pickled_config(**SIZES), "step": 19_072, "val_loss": 3.07}, tmp_path / "model_19072.pt")
    del sys.modules["train_gpt2"]  # nobody who loads it has that program
    info = same(tmp_path / "model_19072.pt", gpt)
    assert info["step"] == 19_072 and info["val_loss"] == 3.07


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_of_gpt2_tokens(gpt, tmp_path, bias):
    if not bias:
        for name, w in gpt.named_parameters():
            if name.endswith("bias"):
                w.data.zero_()
    state = {name: w for name, w in gpt.state_dict().items() if bias or not name.endswith("bias")}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save({"model": {f"_orig_mod.{name}": w for name, w in state.items()}, "optimizer": {"state": {}, "param_groups": []},
                "model_args": {**SIZES, "bias": bias, "dropout": 0.2}, "iter_num": 600_000, "best_val_loss": torch.tensor(2.9),
                "config": {"dataset": "openwebtext"}}, tmp_path / "ckpt.pt")
    assert same(tmp_path / "ckpt.pt", gpt, activation="gelu")["val_loss"] == pytest.approx(2.9)


def test_nanogpts_characters_come_from_meta_pkl(tmp_path):
    letters, gpt = "\n abc", tiny_gpt(vocab_size=5)
    (tmp_path / "out").mkdir()
    path, meta = tmp_path / "out" / "ckpt.pt", tmp_path / "data" / "abc" / "meta.pkl"
    torch.save({"model": gpt.state_dict(), "model_args": {**SIZES, "vocab_size": 5, "bias": True}, "iter_num": 1,
                "best_val_loss": 1.0, "config": {"dataset": "abc"}}, path)
    with pytest.raises(UserError, match=r"data/<dataset>/meta.pkl: put that file beside it"):
        checkpoint.load_model(path)
    meta.parent.mkdir(parents=True)
    stoi = {c: i for i, c in enumerate(letters)}
    meta.write_bytes(pickle.dumps({"vocab_size": 5, "itos": dict(enumerate(letters)), "stoi": stoi}))
    same(path, gpt, tokens=5, activation="gelu")
    assert checkpoint.load_model(path)[1].decode([2, 3, 4]) == "abc"
    meta.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(UserError, match="a pickle that wants"):
        checkpoint.load_model(path)
    assert not (tmp_path / "ran").exists()


def test_the_example_of_the_space_this_started_from(gpt, tmp_path):
    """Its four lines, on a checkpoint of ours."""
    write_atomically(tmp_path / "model_19073.pt", lambda file: torch.save({
        "format": 1, "model": gpt.state_dict(), "config": dataclasses.asdict(gpt.config), "tokenizer": {"kind": "gpt2"},
        "step": 19_073, "val_loss": 3.1}, file))
    loaded = torch.load(tmp_path / "model_19073.pt", map_location="cpu")
    model = GPT(loaded["config"])
    missing = model.load_state_dict(loaded["model"], strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    logits, loss = model(torch.arange(12)[None])
    assert logits.shape == (1, 12, 50304) and loss is None


# ----------------------------------------------------------------------------------------------------------------
# Damage

class Malicious:
    """Unpickled freely, it would make a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_a_pickle_that_would_run_code_runs_nothing(gpt, tmp_path, pickled_config):
    for content in (Malicious(tmp_path / "ran"), {"model": gpt.state_dict(), "config": Malicious(tmp_path / "ran")},
                    {"model": {"x": Malicious(tmp_path / "ran")}, "config": pickled_config(**SIZES)}):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="is damaged, or is not a checkpoint"):
            checkpoint.load_model(tmp_path / "bad.pt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="is damaged, or is not a checkpoint"):
            checkpoint.load_model(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_not_inflated(gpt, tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(10**6)}, "config": SIZES}, buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "bomb.pt")
    state = gpt.state_dict() | {"transformer.wte.weight": torch.zeros(1).expand(10**9, 16)}  # 64 GB of one number
    torch.save({"format": 1, "model": state, "config": {**SIZES, "vocab_size": 10**9}, "tokenizer": {"kind": "gpt2"},
                "step": 1, "val_loss": 1.0}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="more weights than it holds"):
        checkpoint.load_model(tmp_path / "wide.pt")


def test_entries_that_share_their_bytes_are_a_bomb_too(gpt, tmp_path):
    """A directory of entries that all name the same place: each is as large as it says, together they are not."""
    torch.save({"model": gpt.state_dict(), "config": SIZES}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a", zipfile.ZIP_STORED) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(50):
            again = copy.copy(largest)
            again.filename = f"x/data/{1000 + i}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_a_config_of_a_billion_layers_builds_none(gpt, tmp_path):
    save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2"))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(UserError, match="do not fit"):
        checkpoint.load_model(tmp_path / "x")


def test_what_a_config_tells_of_its_training_is_believed_where_it_can_be_meant(gpt, tmp_path):
    save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2"), step="abc", val_loss=10**400, train_config="x")
    info = checkpoint.load_model(tmp_path / "x")[2]
    assert not {"step", "val_loss", "train_config"} & set(info)
    save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2"), step=True, val_loss=float("nan"), train_config={"corpus": 3})
    info = checkpoint.load_model(tmp_path / "x")[2]
    assert info["train_config"] == {"corpus": 3} and "step" not in info and "val_loss" not in info
    publish.export(str(tmp_path / "x"), tmp_path / "y")


def test_a_value_that_float16_cannot_hold_is_not_written(gpt, tmp_path):
    with torch.no_grad():
        gpt.transformer.ln_f.bias[0] = 1e5
    for write in (lambda: save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2")),):
        with pytest.raises(UserError, match="cannot hold"):
            write()
    assert not (tmp_path / "x" / "model.safetensors").exists()


def test_a_model_that_ends_its_texts_with_a_token_of_its_own_keeps_it(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROSE], 300, special_tokens=["<s>", "</s>"], show_progress=False)
    save_huggingface(tmp_path / "x", tiny_gpt(vocab_size=300), BPETokenizer(bpe._tokenizer.to_str(), 1), torch.float32)
    for folder, name in (("x", "y"), ("y", "z")):
        tokenizer = checkpoint.load_model(tmp_path / folder)[1]
        assert tokenizer.eot == 1 and tokenizer.decode([1]) == "</s>"
        publish.export(str(tmp_path / folder), tmp_path / name)
    assert json.loads((tmp_path / "z" / "config.json").read_text())["eos_token_id"] == 1


def test_damaged_folders_get_one_sentence(tmp_path):
    save_huggingface(tmp_path / "good", tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    weights = load_file(tmp_path / "good" / "model.safetensors")
    nan = {**weights, "transformer.ln_f.bias": torch.full_like(weights["transformer.ln_f.bias"], float("nan"))}
    renamed = {name.replace("ln_f", "ln_g"): w for name, w in weights.items()}
    fewer = {**weights, "transformer.wte.weight": weights["transformer.wte.weight"][:4].clone()}
    for number, (other_config, other_weights, sentence) in enumerate((
            (config, nan, "ln_f.bias holds values that are not finite"), (config, renamed, "do not fit"),
            (config, fewer, "do not fit"), ({**config, "vocab_size": 4}, fewer, "tokenizer in .* has 5 ids, but the model has only 4"),
            ({**config, "n_inner": 17}, weights, "n_inner is 17"),
            ({**config, "activation_function": "relu"}, weights, "activation_function is 'relu'"),
            ({**config, "tie_word_embeddings": False}, weights, "tie_word_embeddings"))):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        (folder / "config.json").write_text(json.dumps(other_config))
        save_file(other_weights, folder / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            checkpoint.load_model(folder)
