"""Other people's weight layouts, in and out.

In: Hugging Face's folder (OpenAI's GPT-2, allenporter's and samkeet's models), and the `.pt` files of this program, of
build-nanogpt and of nanoGPT. Out: Hugging Face's folder, which `transformers`, vLLM and others open, and llama.cpp's GGUF.

Hugging Face's `Conv1D` keeps (in, out) matrices where our `nn.Linear` keeps (out, in), so these are transposed on the
way; names are the same. The padding rows of the embedding stay here. Nothing is unpickled but tensors and plain values.
"""
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from errors import UserError
from files import read_json, write_atomically, write_json
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer, load_tokenizer

# What a config.json may tell of the training: our name for it, and the name there (allenporter's for the loss, too).
INFO = (("train_config", "train_config"), ("step", "step"), ("val_loss", "val_loss_accum"), ("val_loss", "val_loss"))

DAMAGE = (ValueError, KeyError, AttributeError, TypeError, OSError, RuntimeError)  # what reading a damaged file can raise

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

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


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From our orientation to Conv1D's, or back."""
    return {name: w.t() if name.endswith(TRANSPOSED) else w for name, w in state.items()}


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


def fitted(name: str, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`. Raises UserError where a value is too large for it."""
    w = w.detach().cpu().to(dtype)
    if not w.isfinite().all():
        raise UserError(f"{name} has values that {dtype} cannot hold: choose bfloat16 or float32.")
    return w


GGUF_TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16,
              "float16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def save_gguf(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float16", name: str = "gpt2"):
    """Writes llama.cpp's file: matrices in `dtype`, one of GGUF_TYPES, the rest in float32; the head is tied and not stored.

    Raises UserError for what llama.cpp's GPT-2 cannot be: it knows byte-level BPEs that end with `<|endoftext|>`, which it
    splits as GPT-2 does, and GELU's approximation.
    """
    if not tokenizer.splits_as_gpt2 or tokenizer.eot is None:
        raise UserError(f"llama.cpp runs byte-level BPE tokenizers with {END_OF_TEXT} that split words as GPT-2's does, "
                        f"which this model's ({tokenizer.kind}) is not.")
    c, kind = model.config, GGUF_TYPES[dtype]
    if c.activation != "gelu_new":
        raise UserError("llama.cpp's GPT-2 computes GELU by its tanh approximation; this model was trained with the exact one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "float32" else f"MOSTLY_{kind.name}"))
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(FIXED["layer_norm_epsilon"])
    spelled = {i: token for token, i in tokenizer.vocabulary().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([spelled.get(i, f"[unused {i}]") for i in range(tokenizer.vocab_size)])
    writer.add_token_types([gguf.TokenType.UNUSED if i not in spelled else gguf.TokenType.CONTROL if i in tokenizer.special
                            else gguf.TokenType.NORMAL for i in range(tokenizer.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.merges()])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for key, w in model.state_dict().items():
        rows = tokenizer.vocab_size if key == "transformer.wte.weight" else len(w)
        stored = kind if w.dim() == 2 and "wpe" not in key else GGUF_TYPES["float32"]
        if stored == GGUF_TYPES["q8_0"] and w.size(1) % 32:  # its blocks are of 32
            stored = GGUF_TYPES["float16"]
        fitted(key, w, torch.float16 if stored == GGUF_TYPES["float16"] else torch.float32)
        data = gguf.quants.quantize(w[:rows].float().cpu().numpy(), stored)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


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


def our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state under our names, without constant masks and the tied head.

    `torch.compile`, DistributedDataParallel and samkeet's wrapper put prefixes before them, GPT2Model leaves one out.
    """
    ours = {}
    for name, w in state.items():
        bare = re.sub(r"^((_orig_mod|module|model|transformer)\.)*", "", name)
        if not bare.endswith((".attn.bias", ".attn.masked_bias")):
            ours[bare if bare.startswith("lm_head.") else f"transformer.{bare}"] = w
    head = ours.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, ours["transformer.wte.weight"]):
        raise ValueError("its head is not tied to its embedding")
    return ours


def build(config: GPTConfig | dict, state: dict[str, torch.Tensor], source: Path) -> GPT:
    """The model of a configuration with these weights, in float32. Raises UserError where they do not fit."""
    try:
        config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        if len({name.split(".")[2] for name in state if ".h." in name}) != config.n_layer:
            raise ValueError("other layers")
        if not all(w.is_floating_point() and w.layout == torch.strided and w.device.type == "cpu" for w in state.values()):
            raise TypeError("no plain numbers")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict({name: w.float().contiguous() for name, w in state.items()}, assign=True)
    except DAMAGE:
        raise UserError(f"The weights and the configuration in {source} do not fit each other.") from None
    for name, w in model.named_parameters():
        if not w.isfinite().all():
            raise UserError(f"The weights in {source} are damaged: {name} holds values that are not finite.")
    return model


# ----------------------------------------------------------------------------------------------------------------
# .pt files

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
