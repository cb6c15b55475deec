"""Hugging Face's layout, in and out: config.json, safetensors and the tokenizer's files.

In: OpenAI's GPT-2, allenporter's and samkeet's models. Out: a folder that `transformers`, vLLM and others open.
`Conv1D` there keeps (in, out) matrices where our `nn.Linear` keeps (out, in), so these are transposed on the way.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.errors import UserError
from common.files import read_json, write_atomically, write_json
from model import GPT, GPTConfig
from tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from weights.state import DAMAGE, build, fitted, our_names, transposed

# What a config.json may tell of the training: our name for it, and the name there (allenporter's for the loss, too).
INFO = (("train_config", "train_config"), ("step", "step"), ("val_loss", "val_loss_accum"), ("val_loss", "val_loss"))

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}

# Settings of a Hugging Face GPT-2 that would change the mathematics, each with the value that ours has.
FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "tie_word_embeddings": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def huggingface_config(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    c = model.config
    return {"architectures": ["GPT2LMHeadModel"], **FIXED, "activation_function": c.activation,
            "vocab_size": tokenizer.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
            "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": None,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "initializer_range": 0.02,
            "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot, "dtype": str(dtype).removeprefix("torch.")}


def to_huggingface(state: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Our state as GPT2LMHeadModel's, without the embedding's padding rows; the head is tied and not stored."""
    state = transposed(state)
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    return state


def save_huggingface(folder, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float16, **info):
    """Writes config.json, with `info` in it, model.safetensors, generation_config.json and the tokenizer's files into
    `folder`, over any."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_huggingface(model.state_dict(), tokenizer.vocab_size)
    content = save({name: fitted(name, w, dtype).contiguous() for name, w in weights.items()}, {"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda file: file.write(content))
    write_json(folder / "config.json", {**huggingface_config(model, tokenizer, dtype), **info})
    write_json(folder / "generation_config.json",
               {"do_sample": True, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
                "max_new_tokens": min(256, model.config.block_size // 2)})  # transformers does not go on past the context
    tokenizer.save(folder)


# ----------------------------------------------------------------------------------------------------------------
# Folders

def load_folder(folder: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT in float32, tokenizer, what config.json tells of its training) of a folder with config.json and safetensors.

    Raises UserError where it is no GPT-2, or one whose mathematics differ from ours.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json.")
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = our_names(read_safetensors(folder))
        check_config(c, folder)
        config = GPTConfig(block_size=c.get("n_positions") or c.get("n_ctx") or c["block_size"], vocab_size=c["vocab_size"],
                           n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"],
                           activation=ACTIVATIONS[c.get("activation_function", "gelu_new")])
        if state["transformer.h.0.attn.c_attn.weight"].shape == (config.n_embd, 3 * config.n_embd):  # (in, out)
            state = transposed(state)
    except (*DAMAGE, SafetensorError) as error:
        raise UserError(f"The files in {folder} are damaged or no GPT-2's ({type(error).__name__}: {error}).") from None
    if config.vocab_size >= GPT2Tokenizer.vocab_size and not any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer("gpt2")
    else:
        tokenizer = load_tokenizer(folder)
    if tokenizer.kind == "bpe" and tokenizer.eot is None and c.get("eos_token_id") in range(tokenizer.vocab_size):
        tokenizer.eot = c["eos_token_id"]
    info = {key: c[name] for key, name in INFO if name in c}
    return build(config, state, folder), tokenizer, info


def check_config(c: dict, folder: Path):
    """Raises UserError for a configuration that changes the mathematics."""
    ours = {**FIXED, "n_inner": c.get("n_inner") and 4 * c["n_embd"]}
    if c.get("model_type") == "custom_gpt":  # samkeet's name for the same architecture
        ours["model_type"] = "custom_gpt"
    for key, value in ours.items():
        if c.get(key, value) != value:
            raise UserError(f"{folder} is no GPT-2 as this program runs it: its {key} is {c[key]!r}, not {value!r}.")
    if c.get("activation_function", "gelu_new") not in ACTIVATIONS:
        raise UserError(f"{folder} is no GPT-2 as this program runs it: its activation_function is {c['activation_function']!r}.")


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's weights, in one file or in the several that its index names."""
    index = read_json(folder / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} is no whole model folder: it has no {name}.")
    return {key: w for name in names for key, w in load_file(folder / name).items()}
