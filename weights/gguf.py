"""llama.cpp's file format, GGUF, out."""
import os
from pathlib import Path

import gguf
import torch

from common.errors import UserError
from model import GPT
from tokenizer import END_OF_TEXT, Tokenizer
from weights.huggingface import FIXED
from weights.state import fitted

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
