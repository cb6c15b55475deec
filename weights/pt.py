"""Loads `.pt` checkpoints of this program, of build-nanogpt and of nanoGPT.

Only tensors and plain values are unpickled, so a checkpoint cannot run code.
"""
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from model import GPT
from tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from weights.state import DAMAGE, build_model, normalize_names

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # the fields of their configs
FOLDER = 0x10  # in the external attributes of a zip entry


def load_pt(path: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT in float32, tokenizer, its step and validation loss) from a checkpoint of any program.

    Raises UserError if the file is damaged or has another format.
    """
    content = unpickle(path)
    try:
        if content.get("format") == 1:
            state, config = content["model"], content["config"]
            tokenizer = load_tokenizer(dict(content["tokenizer"]))
            info = {"step": content["step"], "val_loss": content["val_loss"]}
        elif "model_args" in content:
            state, config, tokenizer, info = from_nanogpt(content, path)
        else:
            state, config, tokenizer, info = from_build_nanogpt(content)
        # an expanded tensor is small in the file but could be of any size in memory
        if sum(w.nbytes for w in state.values()) > path.stat().st_size:
            raise ValueError("it names more weights than it holds")
    except DAMAGE as error:
        raise UserError(f"{path} is not a checkpoint of this program, of build-nanogpt or of "
                        f"nanoGPT ({type(error).__name__}: {error}).") from None
    return build_model(config, state, path), tokenizer, info


def from_build_nanogpt(content: dict) -> tuple[dict, dict, Tokenizer, dict]:
    """(state, configuration, tokenizer, info) from a checkpoint of build-nanogpt."""
    fields = vars(content["config"])
    config = {name: fields[name] for name in SIZES}
    info = {"step": content.get("step"), "val_loss": content.get("val_loss")}
    return normalize_names(content["model"]), config, load_tokenizer("gpt2"), info


def from_nanogpt(content: dict, path: Path) -> tuple[dict, dict, Tokenizer, dict]:
    """(state, configuration, tokenizer, info) from nanoGPT's ckpt.pt.

    nanoGPT computes the exact GELU, and may train without biases, which are zeros here. Raises
    UserError if the model has a character tokenizer and its meta.pkl is not found.
    """
    arguments = dict(content["model_args"])
    config = {name: arguments[name] for name in SIZES} | {"activation": "gelu"}
    # a number, or a tensor that may require grad
    val_loss = torch.as_tensor(content["best_val_loss"], dtype=torch.float64)
    info = {"step": content["iter_num"], "val_loss": val_loss.item()}
    state = normalize_names(content["model"])
    # add the biases that the model was trained without
    for name in list(state):
        if name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(state[name])))
    # look for a character tokenizer beside the checkpoint and in nanoGPT's data folder
    dataset = str(content.get("config", {}).get("dataset", ""))
    for folder in path.parent, path.parent.parent / "data" / Path(dataset).name:
        if (folder / "meta.pkl").is_file():
            return state, config, load_tokenizer(folder), info
    if arguments["vocab_size"] < GPT2Tokenizer.vocab_size:
        raise UserError(f"{path} needs its character tokenizer, which nanoGPT keeps in "
                        "data/<dataset>/meta.pkl: put that file beside it.")
    return state, config, load_tokenizer("gpt2"), info


class ForeignConfig:
    """Stands in for another program's GPTConfig: holds its fields and runs none of its code."""


def unpickle(path: Path) -> dict:
    """The contents of a `.pt` file: tensors, plain values, and the fields of a GPTConfig.

    Raises UserError if the file is damaged or names any other class.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch does not compress: an archive that unpacks to more than its size is a zip bomb
            is_bomb = sum(entry.file_size for entry in entries) > path.stat().st_size
            # torch.load silently reads nothing from an entry that is marked as a folder
            is_stored = all(entry.compress_type == zipfile.ZIP_STORED
                            and not entry.external_attr & FOLDER for entry in entries)
            # testzip verifies the checksums, which torch.load does not
            if is_bomb or not is_stored or archive.testzip():
                raise zipfile.BadZipFile
        # allow one class, GPTConfig, from any module
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        configs = [(ForeignConfig, name) for name in classes
                   if name.rpartition(".")[2] == "GPTConfig"]
        with torch.serialization.safe_globals(configs):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        reason = "it does not hold a dictionary"
    except Exception as error:  # opcodes in a wrong order raise anything
        reason = type(error).__name__
    raise UserError(f"{path} is damaged, or is not a checkpoint ({reason}).")
