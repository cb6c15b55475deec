"""`.pt` files in: those of this program, of build-nanogpt and of nanoGPT. Nothing is unpickled but tensors and plain values."""
import pickle
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from model import GPT
from tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from weights.state import DAMAGE, build, our_names


def load_pt(path: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT in float32, tokenizer, step and validation loss) of a checkpoint of ours, of build-nanogpt's or of nanoGPT's."""
    content = unpickle(path)
    try:
        if content.get("format") == 1:
            state, config, tokenizer = content["model"], content["config"], load_tokenizer(dict(content["tokenizer"]))
            info = {"step": content["step"], "val_loss": content["val_loss"]}
        elif "model_args" in content:
            state, config, tokenizer = from_nanogpt(content, path)
            info = {"step": content["iter_num"], "val_loss": float(content["best_val_loss"])}
        else:
            fields = vars(content["config"])
            config = {name: fields[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
            state, tokenizer = our_names(content["model"]), load_tokenizer("gpt2")
            info = {"step": content.get("step"), "val_loss": content.get("val_loss")}
        if sum(w.nbytes for w in state.values()) > path.stat().st_size:
            raise ValueError("it names more weights than it holds")
    except DAMAGE as error:
        raise UserError(f"{path} is no checkpoint of this program, of build-nanogpt or of nanoGPT ({type(error).__name__}: "
                        f"{error}).") from None
    return build(config, state, path), tokenizer, info


def from_nanogpt(content: dict, path: Path) -> tuple[dict, dict, Tokenizer]:
    """State, configuration and tokenizer of nanoGPT's ckpt.pt: the exact GELU, and biases that may be left out."""
    arguments = content["model_args"]
    config = {name: arguments[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    state = our_names(content["model"])
    for name in list(state):
        if name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(state[name])))
    dataset = str(content.get("config", {}).get("dataset", ""))
    for folder in path.parent, path.parent.parent / "data" / Path(dataset).name:
        if (folder / "meta.pkl").is_file():
            return state, config | {"activation": "gelu"}, load_tokenizer(folder)
    if arguments["vocab_size"] < GPT2Tokenizer.vocab_size:
        raise UserError(f"{path} speaks in characters, which nanoGPT keeps in data/<dataset>/meta.pkl: put that file beside it.")
    return state, config | {"activation": "gelu"}, load_tokenizer("gpt2")


class ForeignConfig:
    """What a pickled GPTConfig becomes here: its fields, and none of its code."""


def unpickle(path: Path) -> dict:
    """The contents of a `.pt` file: tensors, plain values, and a GPTConfig's fields."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:  # torch compresses nothing
                raise ValueError("an archive that unpacks to more than it is")
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        configs = [(ForeignConfig, name) for name in wanted if name.rpartition(".")[2] == "GPTConfig"]
        with torch.serialization.safe_globals(configs):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        reason = "it holds no dictionary"
    except (*DAMAGE, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}"
    raise UserError(f"{path} is cut off or no checkpoint ({reason}).")
