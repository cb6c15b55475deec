"""Loads and saves GPT-2 in Hugging Face's layout: config.json, safetensors and a tokenizer's files.

Loads OpenAI's GPT-2 and the models of allenporter and samkeet. Saves a folder that `transformers`,
vLLM and others open. Hugging Face's GPT-2 keeps its matrices in `Conv1D` as (in, out), and our
`nn.Linear` keeps them as (out, in), so they are transposed in both directions.
"""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from common.errors import UserError
from common.files import parse_json, read_json, write_atomically, write_json
from model import GPT
from tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from weights.state import DAMAGE, build_model, cast_weight, normalize_names, transpose_conv1d

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

# Hugging Face's names of the two GELUs, and ours
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}

# settings that would change what the model computes, with the only values that ours supports
FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False,
         "add_cross_attention": False}


# --------------------------------------------------------------------------------------------------
# Saving

def save_huggingface(folder, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float16,
                     **info):
    """Writes the model and its tokenizer into `folder`, and overwrites the files of an earlier one.

    The files are model.safetensors in `dtype`, config.json, generation_config.json and the
    tokenizer's own. The weights' checksum and `info` are in the header of model.safetensors: a
    program that trains the model further keeps config.json, but writes a new header.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # weights
    weights = to_huggingface(model.state_dict(), tokenizer.vocab_size)
    weights = {name: cast_weight(name, w, dtype).contiguous() for name, w in weights.items()}
    content = save(weights)
    checksum = hashlib.sha256(memoryview(content)[header_size(content):]).hexdigest()
    content = save(weights, {"format": "pt", "sha256": checksum, "training": json.dumps(info)})
    write_atomically(folder / "model.safetensors", lambda file: file.write(content))
    # configuration
    write_json(folder / "config.json", huggingface_config(model, tokenizer, dtype))
    write_json(folder / "generation_config.json", {
        "do_sample": True, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
        # by default, stay within the context: transformers cannot generate beyond it
        "max_new_tokens": min(256, model.config.block_size // 2)})
    tokenizer.save(folder)


def to_huggingface(state: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Converts our weights to GPT2LMHeadModel's, without the embedding's padding rows.

    The head is tied to the embedding and not stored.
    """
    state = transpose_conv1d(state)
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    return state


def huggingface_config(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """The content of config.json."""
    c = model.config
    return {
        "architectures": ["GPT2LMHeadModel"], **FIXED, "activation_function": c.activation,
        "vocab_size": tokenizer.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
        "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": None,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "initializer_range": 0.02, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot,
        "dtype": str(dtype).removeprefix("torch."),
    }


# --------------------------------------------------------------------------------------------------
# Loading

def load_folder(folder: Path) -> tuple[GPT, Tokenizer, dict]:
    """(GPT in float32, tokenizer, the training's info among other fields) from a model folder.

    Raises UserError if a file is missing or damaged, if it is not a GPT-2, or if a setting changes
    what the model computes.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    try:
        c = read_json(folder / "config.json")
        state, training = read_safetensors(folder)
        state = normalize_names(state)
        check_config(c, folder)
        config = {key: c[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config["block_size"] = c.get("n_positions") or c.get("n_ctx") or c["block_size"]
        config["activation"] = ACTIVATIONS[c.get("activation_function", "gelu_new")]
        # transpose Conv1D's (in, out) matrices; samkeet's are (out, in) already
        rows, columns = state["transformer.h.0.attn.c_attn.weight"].shape
        if rows < columns:
            state = transpose_conv1d(state)
    except DAMAGE as error:
        raise UserError(f"The files in {folder} are damaged, or they are not a GPT-2 "
                        f"({type(error).__name__}: {error}).") from None
    model = build_model(config, state, folder)
    # other programs, and older versions of this one, describe the training in config.json
    info = training or {"val_loss": c.get("val_loss_accum"), **c}  # allenporter's name, and ours
    return model, read_tokenizer(folder, c), info


def read_tokenizer(folder: Path, c: dict) -> Tokenizer:
    """The folder's tokenizer, or GPT-2's if it has none and the vocabulary is large enough."""
    has_files = any((folder / name).exists() for name in TOKENIZER_FILES)
    if c["vocab_size"] >= GPT2Tokenizer.vocab_size and not has_files:
        return load_tokenizer("gpt2")
    tokenizer = load_tokenizer(folder)
    # take the end-of-text token from config.json if its name is not <|endoftext|>
    eos = c.get("eos_token_id")
    if tokenizer.kind == "bpe" and tokenizer.eot is None and eos in range(tokenizer.vocab_size):
        tokenizer.eot = eos
    return tokenizer


def check_config(c: dict, folder: Path):
    """Raises UserError for a setting that changes what the model computes."""
    supported = {key: [value] for key, value in FIXED.items()}
    supported["model_type"].append("custom_gpt")  # samkeet's name for the same architecture
    supported["n_inner"] = [None, 4 * c["n_embd"]]
    supported["activation_function"] = list(ACTIVATIONS)
    for key, values in supported.items():
        if key in c and c[key] not in values:
            raise UserError(f"{folder} is not a GPT-2 that this program can run: its {key} is "
                            f"{c[key]!r} and must be {' or '.join(map(repr, values))}.")


def read_safetensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights, from one file or all files that the index names, and the training's info.

    Raises ValueError if a file does not match the checksum in its header.
    """
    index = read_json(folder / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    state, training = {}, {}
    for name in names:
        # an index must not lead outside the folder
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} is not a complete model folder: it has no {name}.")
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata() or {}
        if "sha256" in metadata:
            with open(folder / name, "rb") as file:
                file.seek(header_size(file.read(8)))
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if checksum != metadata["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
        training |= parse_json(metadata.get("training", "{}"))
        state |= load_file(folder / name)
    return state, training


def header_size(content: bytes) -> int:
    """The size in bytes of a safetensors file's header, from the 8 bytes with which it starts."""
    return 8 + int.from_bytes(content[:8], "little")
