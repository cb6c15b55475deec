"""Other people's weight layouts. Today: Hugging Face's folder, which `transformers`, vLLM and others open.

Their `Conv1D` keeps (in, out) matrices where our `nn.Linear` keeps (out, in), so these are transposed on the way;
names are the same. The padding rows of the embedding stay here.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import UserError
from files import write_json
from model import GPT, GPTConfig
from tokenizer import Tokenizer, load_tokenizer

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

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
    state = {name: w.t() if name.endswith(TRANSPOSED) else w for name, w in state.items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    return state


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT2LMHeadModel's or GPT2Model's state as ours; their constant mask buffers and the tied head are left out."""
    state = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": w for name, w in state.items()}
    return {name: w.t().contiguous() if name.endswith(TRANSPOSED) else w for name, w in state.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"}


def save_huggingface(folder, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float16):
    """Writes config.json, model.safetensors, generation_config.json and the tokenizer's files into `folder`, over any."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_huggingface(model.state_dict(), tokenizer.vocab_size)
    save_file({name: w.detach().cpu().to(dtype).contiguous() for name, w in weights.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", huggingface_config(model, tokenizer, dtype))
    write_json(folder / "generation_config.json",
               {"do_sample": True, "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})
    tokenizer.save(folder)


def load_huggingface(folder) -> tuple[GPT, Tokenizer]:
    """(GPT in float32, tokenizer) of a folder in Hugging Face's layout. Raises UserError where it is no GPT-2."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no model folder: it has no {name}.")
    try:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, ours in FIXED.items():
            if c.get(key, ours) != ours:
                raise UserError(f"{folder} is no GPT-2 as this program runs it: its {key} is {c[key]!r}, not {ours!r}.")
        config = GPTConfig(block_size=c["n_positions"], vocab_size=c["vocab_size"], n_layer=c["n_layer"],
                           n_head=c["n_head"], n_embd=c["n_embd"], activation=c.get("activation_function", "gelu_new"))
        state = from_huggingface(load_file(folder / "model.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"The files in {folder} are damaged or no GPT-2's ({type(error).__name__}: {error}).") from None
    return build(config, state, folder), load_tokenizer(folder)


def build(config: GPTConfig | dict, state: dict[str, torch.Tensor], source: Path) -> GPT:
    """The model of a configuration with these weights, in float32. Raises UserError where they do not fit."""
    try:
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        raise UserError(f"The weights and the configuration in {source} do not fit each other.") from None
    return model
