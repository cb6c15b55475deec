"""Saves a model as GGUF, llama.cpp's file format."""
import os
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, TokenType

from common.errors import UserError
from model import GPT
from tokenizer import END_OF_TEXT, Tokenizer
from weights.huggingface import FIXED
from weights.state import cast_weight

TYPES = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16,
         "float16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
Q8_0_BLOCK = 32  # q8_0 quantizes blocks of 32 weights along a row


def save_gguf(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float16",
              name: str = "gpt2"):
    """Writes llama.cpp's file to `path`.

    Stores matrices in `dtype` (float32, bfloat16, float16 or q8_0), everything else in float32.
    The head is tied to the embedding and not stored.

    Raises UserError for what llama.cpp's GPT-2 does not support: a tokenizer that is not a
    byte-level BPE with `<|endoftext|>` and GPT-2's word splitting, or the exact GELU.
    """
    if not tokenizer.splits_like_gpt2 or tokenizer.eot is None:
        raise UserError(f"llama.cpp needs a byte-level BPE with {END_OF_TEXT} that splits words as "
                        f"GPT-2 does, and this model has another tokenizer ({tokenizer.kind}): "
                        "export it with --to hf.")
    c = model.config
    if c.activation != "gelu_new":
        raise UserError("llama.cpp's GPT-2 computes the tanh approximation of GELU, and this model "
                        "was trained with the exact one: export it with --to hf.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    # describe the architecture
    file_type = "ALL_F32" if dtype == "float32" else f"MOSTLY_{TYPES[dtype].name}"
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(FIXED["layer_norm_epsilon"])
    # add the tokenizer and the weights, then write the file
    add_tokenizer(writer, tokenizer)
    add_weights(writer, model, tokenizer.vocab_size, TYPES[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer):
    # every id needs a token, also those that the vocabulary leaves out
    spelling = {i: token for token, i in tokenizer.vocabulary().items()}
    ids = range(tokenizer.vocab_size)
    types = [TokenType.NORMAL if i in spelling else TokenType.UNUSED for i in ids]
    for i in tokenizer.special_ids:
        types[i] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([spelling.get(i, f"[unused {i}]") for i in ids])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer.merges()])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_weights(writer: gguf.GGUFWriter, model: GPT, vocab_size: int,
                matrix_type: GGMLQuantizationType):
    """Adds the weights under llama.cpp's names, without the embedding's padding rows."""
    state = model.state_dict()
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for key, w in state.items():
        stored = matrix_type if w.dim() == 2 and "wpe" not in key else TYPES["float32"]
        if stored == TYPES["q8_0"] and w.size(1) % Q8_0_BLOCK:
            stored = TYPES["float16"]
        # check that the values fit, then let gguf convert them
        cast_weight(key, w, torch.float16 if stored == TYPES["float16"] else torch.float32)
        data = gguf.quants.quantize(w.float().cpu().numpy(), stored)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=stored)
