"""Loads GPT-2 in the formats of other programs, each written here as its own program writes it."""
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


def assert_loads(name, gpt: GPT, tokens=50257, **changes) -> dict:
    """Checks that the model called `name` computes the same as `gpt`; returns its info."""
    model, tokenizer, info = checkpoint.load_model(name)
    x = torch.arange(12)[None] % gpt.config.vocab_size
    expected = GPT(dataclasses.replace(gpt.config, **changes)).eval()
    expected.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        logits = model(x)[0][..., :tokens]
        assert torch.allclose(logits, expected(x)[0][..., :tokens], atol=1e-5)
    assert tokenizer.vocab_size == tokens
    return info


# --------------------------------------------------------------------------------------------------
# Hugging Face folders

def test_allenporters_layout_opens(gpt, tmp_path):
    """(in, out) matrices, block_size instead of n_positions, no tokenizer; keeps training info."""
    weights = to_huggingface(gpt.state_dict(), 50304)
    weights = {name: w.contiguous() for name, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 16, **SIZES,
        "val_loss_accum": 3.05, "train_config": {"step": 18_000, "max_lr": 6e-4}}))
    info = assert_loads(tmp_path, gpt)
    assert info["train_config"]["step"] == 18_000 and info["val_loss"] == 3.05


def test_samkeets_layout_opens(gpt, tmp_path):
    """(out, in) matrices under the prefix `model.`, with the tied head stored as well."""
    weights = {f"model.{name}": w.clone() for name, w in gpt.state_dict().items()}
    weights["model.lm_head.weight"] = weights["model.transformer.wte.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom_gpt", **SIZES}))
    assert_loads(tmp_path, gpt)
    weights["model.lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head is not tied"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_without_prefix_with_masks_and_in_several_files_open(gpt, tmp_path, dtype):
    save_huggingface(tmp_path, gpt, load_tokenizer("gpt2"), torch.float32)
    weights = {name.removeprefix("transformer."): w.to(dtype)
               for name, w in load_file(tmp_path / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    # divide the weights between two files
    names = sorted(weights)
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if dtype == torch.float32:
        assert_loads(tmp_path, gpt)
    else:
        checkpoint.load_model(tmp_path)
    # a file is missing, or outside the folder
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="has no model-00002"):
        checkpoint.load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(UserError, match="not a complete model folder"):
        checkpoint.load_model(tmp_path)


def test_an_end_of_text_token_with_another_name_is_kept(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([PROSE], 300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = BPETokenizer(bpe._tokenizer.to_str(), 1)
    save_huggingface(tmp_path / "x", tiny_gpt(vocab_size=300), tokenizer, torch.float32)
    for folder, name in (("x", "y"), ("y", "z")):
        tokenizer = checkpoint.load_model(tmp_path / folder)[1]
        assert tokenizer.eot == 1 and tokenizer.decode([1]) == "</s>"
        publish.export(str(tmp_path / folder), tmp_path / name)
    assert json.loads((tmp_path / "z" / "config.json").read_text())["eos_token_id"] == 1


def test_training_info_in_a_config_is_used_only_if_its_values_are_possible(gpt, tmp_path):
    tokenizer = load_tokenizer("gpt2")
    save_huggingface(tmp_path / "x", gpt, tokenizer, step="abc", val_loss=10**400, train_config="x")
    info = checkpoint.load_model(tmp_path / "x")[2]
    assert not {"step", "val_loss", "train_config"} & set(info)
    save_huggingface(tmp_path / "x", gpt, tokenizer, step=True, val_loss=float("nan"),
                     train_config={"corpus": 3})
    info = checkpoint.load_model(tmp_path / "x")[2]
    assert info["train_config"] == {"corpus": 3}
    assert "step" not in info and "val_loss" not in info
    publish.export(str(tmp_path / "x"), tmp_path / "y")


def test_a_value_that_float16_cannot_hold_is_not_written(gpt, tmp_path):
    with torch.no_grad():
        gpt.transformer.ln_f.bias[0] = 1e5
    with pytest.raises(UserError, match="cannot hold"):
        save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2"))
    assert not (tmp_path / "x" / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# .pt files

@pytest.fixture
def pickled_config(monkeypatch):
    """A GPTConfig from a program called train_gpt2, as build-nanogpt's checkpoints hold it."""
    program = types.ModuleType("train_gpt2")
    program.GPTConfig = dataclasses.make_dataclass("GPTConfig", SIZES)
    program.GPTConfig.__module__ = "train_gpt2"
    monkeypatch.setitem(sys.modules, "train_gpt2", program)
    return program.GPTConfig


def test_a_checkpoint_of_build_nanogpt_opens(gpt, tmp_path, pickled_config):
    path = tmp_path / "model_19072.pt"
    state = {f"_orig_mod.module.{name}": w for name, w in gpt.state_dict().items()}
    state["_orig_mod.module.lm_head.weight"] = gpt.state_dict()["transformer.wte.weight"]
    config = pickled_config(**SIZES)
    torch.save({"model": state, "config": config, "step": 19_072, "val_loss": 3.07}, path)
    del sys.modules["train_gpt2"]  # whoever loads it does not have that program
    info = assert_loads(path, gpt)
    assert info["step"] == 19_072 and info["val_loss"] == 3.07


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_with_gpt2_tokens_opens(gpt, tmp_path, recwarn, bias):
    if not bias:
        for name, w in gpt.named_parameters():
            if name.endswith("bias"):
                w.data.zero_()
    state = {name: w for name, w in gpt.state_dict().items() if bias or not name.endswith("bias")}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save({
        "model": {f"_orig_mod.{name}": w for name, w in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**SIZES, "bias": bias, "dropout": 0.2},
        "iter_num": 600_000, "best_val_loss": torch.tensor(2.9, requires_grad=True),
        "config": {"dataset": "openwebtext"}}, tmp_path / "ckpt.pt")
    info = assert_loads(tmp_path / "ckpt.pt", gpt, activation="gelu")
    assert info["val_loss"] == pytest.approx(2.9)
    assert not recwarn.list


def test_nanogpts_characters_come_from_meta_pkl(tmp_path):
    letters = "\n abc"
    gpt = tiny_gpt(vocab_size=5)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "ckpt.pt"
    meta = tmp_path / "data" / "abc" / "meta.pkl"
    torch.save({
        "model": gpt.state_dict(), "model_args": {**SIZES, "vocab_size": 5, "bias": True},
        "iter_num": 1, "best_val_loss": 1.0, "config": {"dataset": "abc"}}, path)
    with pytest.raises(UserError, match=r"data/<dataset>/meta.pkl: put that file beside it"):
        checkpoint.load_model(path)
    meta.parent.mkdir(parents=True)
    stoi = {c: i for i, c in enumerate(letters)}
    itos = dict(enumerate(letters))
    meta.write_bytes(pickle.dumps({"vocab_size": 5, "itos": itos, "stoi": stoi}))
    assert_loads(path, gpt, tokens=5, activation="gelu")
    assert checkpoint.load_model(path)[1].decode([2, 3, 4]) == "abc"
    meta.write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(UserError, match="the pickle refers to"):
        checkpoint.load_model(path)
    meta.write_bytes(b"\x80\x02}r\xff\xff\xff\x07.")  # Python would reserve 2 GB for the number
    with pytest.raises(UserError, match="the pickle numbers a value 134,217,727"):
        checkpoint.load_model(path)
    assert not (tmp_path / "ran").exists()


def test_four_lines_of_pytorch_load_a_checkpoint_of_ours(gpt, tmp_path):
    """As in the Space that this project started from."""
    write_atomically(tmp_path / "model_19073.pt", lambda file: torch.save({
        "format": 1, "model": gpt.state_dict(), "config": dataclasses.asdict(gpt.config),
        "tokenizer": {"kind": "gpt2"}, "step": 19_073, "val_loss": 3.1}, file))
    loaded = torch.load(tmp_path / "model_19073.pt", map_location="cpu")
    model = GPT(loaded["config"])
    missing = model.load_state_dict(loaded["model"], strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    logits, loss = model(torch.arange(12)[None])
    assert logits.shape == (1, 12, 50304) and loss is None


# --------------------------------------------------------------------------------------------------
# Damaged and malicious files

class Malicious:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_a_malicious_pickle_runs_no_code(gpt, tmp_path, pickled_config):
    malicious = Malicious(tmp_path / "ran")
    for content in (malicious, {"model": gpt.state_dict(), "config": malicious},
                    {"model": {"x": malicious}, "config": pickled_config(**SIZES)}):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="is damaged, or is not a checkpoint"):
            checkpoint.load_model(tmp_path / "bad.pt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="is damaged, or is not a checkpoint"):
            checkpoint.load_model(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_not_inflated(gpt, tmp_path):
    # a compressed archive
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(10**6)}, "config": SIZES}, buffer)
    with (zipfile.ZipFile(buffer) as stored,
          zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as deflated):
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "bomb.pt")
    # 64 GB that consist of one stored number
    expanded = torch.zeros(1).expand(10**9, 16)
    torch.save({
        "format": 1, "model": gpt.state_dict() | {"transformer.wte.weight": expanded},
        "config": {**SIZES, "vocab_size": 10**9}, "tokenizer": {"kind": "gpt2"},
        "step": 1, "val_loss": 1.0}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="more weights than it holds"):
        checkpoint.load_model(tmp_path / "wide.pt")


def test_zip_entries_that_share_their_bytes_are_a_bomb_too(gpt, tmp_path):
    """Many entries refer to the same bytes: each has its true size, but their sum is too large."""
    torch.save({"model": gpt.state_dict(), "config": SIZES}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a", zipfile.ZIP_STORED) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(50):
            duplicate = copy.copy(largest)
            duplicate.filename = f"x/data/{1000 + i}"
            archive.filelist.append(duplicate)
            archive.NameToInfo[duplicate.filename] = duplicate
        archive._didModify = True
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("place, bit", [(38, 0x10), (10, 8)], ids=["folder", "compressed"])
def test_one_wrong_bit_in_the_zip_directory_is_damage(gpt, tmp_path, place, bit):
    """From a tensor that is marked as a folder, torch.load would read nothing, so that the weights
    are what the memory held before; one that is marked as compressed, zlib cannot read."""
    torch.save({"format": 1, "model": gpt.state_dict(), "config": SIZES,
                "tokenizer": {"kind": "gpt2"}, "step": 1, "val_loss": 1.0}, tmp_path / "x.pt")
    checkpoint.load_model(tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    entry = content.rfind(b"PK\1\2", 0, content.rfind(b"/data/10"))
    content[entry + place] |= bit
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"\x80\x02}(K\x01u.", b"\x80\x02X", b"\x80\x020."],
                         ids=["a key without a value", "no length", "an empty stack"])
def test_opcodes_in_a_wrong_order_are_damage(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", "3\n")
    with pytest.raises(UserError, match="is damaged, or is not a checkpoint"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_a_checkpoint_of_nanogpt_with_a_number_as_its_arguments_is_damaged(
        gpt, tmp_path, recwarn):
    torch.save({"model": gpt.state_dict(), "model_args": torch.tensor(3)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        checkpoint.load_model(tmp_path / "ckpt.pt")
    assert not recwarn.list


def test_a_checkpoint_of_nanogpt_with_a_loss_beyond_all_floats_is_damaged(gpt, tmp_path):
    sizes = {name: getattr(gpt.config, name) for name in
             ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    torch.save({"model": gpt.state_dict(), "model_args": sizes, "iter_num": 5,
                "best_val_loss": 10**400}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        checkpoint.load_model(tmp_path / "ckpt.pt")


def test_a_config_with_a_billion_layers_is_not_built(gpt, tmp_path):
    save_huggingface(tmp_path / "x", gpt, load_tokenizer("gpt2"))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(UserError, match="do not fit"):
        checkpoint.load_model(tmp_path / "x")


def test_damaged_folders_get_one_sentence(tmp_path):
    save_huggingface(tmp_path / "good", tiny_gpt(vocab_size=8), CharTokenizer("\n abc"))
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    weights = load_file(tmp_path / "good" / "model.safetensors")
    bias = weights["transformer.ln_f.bias"]
    nan = {**weights, "transformer.ln_f.bias": torch.full_like(bias, float("nan"))}
    renamed = {name.replace("ln_f", "ln_g"): w for name, w in weights.items()}
    wte = weights["transformer.wte.weight"]
    fewer = {**weights, "transformer.wte.weight": wte[:4].clone()}
    cases = (
        (config, nan, "ln_f.bias holds values that are not finite"),
        (config, renamed, "do not fit"),
        (config, fewer, "do not fit"),
        ({**config, "vocab_size": 4}, fewer, "tokenizer in .* has 5 ids, but the model has only 4"),
        ({**config, "n_inner": 17}, weights, "n_inner is 17"),
        ({**config, "activation_function": "relu"}, weights, "activation_function is 'relu'"),
        ({**config, "tie_word_embeddings": False}, weights, "tie_word_embeddings"),
    )
    for number, (changed_config, changed_weights, sentence) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        (folder / "config.json").write_text(json.dumps(changed_config))
        save_file(changed_weights, folder / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            checkpoint.load_model(folder)
    # JSON that is nested too deeply, in either place
    save_file(weights, tmp_path / "good" / "model.safetensors", {"training": "[" * 10**5})
    with pytest.raises(UserError, match="are damaged"):
        checkpoint.load_model(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="are damaged"):
        checkpoint.load_model(tmp_path / "good")
