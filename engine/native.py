"""A step of forward.py in C++, on a CPU with AVX2 where there is a compiler: `forward(model, "int8")` chooses.

A token is some 500 small calls of torch, which cost more than its arithmetic. native.cpp does a step in one: it is compiled
when it is first used, in two seconds, and kept in the user's cache folder.
"""
import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F

import ddp
from engine.forward import Forward, Segment
from engine.packed import quantize_rows
from model import GPT

SOURCE = Path(__file__).with_name("native.cpp")
KINDS = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8"}  # native.cpp's names
PANEL, OUTPUT_BLOCK = 16, 64  # outputs whose weights lie together, and those that a thread computes at a time


def forward(model: GPT, dtype: str) -> Forward:
    """The steps of a model, by the fastest way there is."""
    config, weight = model.config, model.transformer.wte.weight
    plain = Forward(model, dtype)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or ddp.is_sharded(model):
        return plain
    try:
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            raise OSError("this CPU has no AVX2")
        if config.n_embd // config.n_head % 8:
            raise OSError("a head's size is not a multiple of 8")
        return NativeForward(model, dtype)
    except OSError as error:
        plain.backend = f"by torch, several times slower than by native.cpp: {error}"
        return plain


@functools.cache
def compiled(kind: str, cache: str):
    """native.cpp's function for a kind of weights and of caches. Raises OSError where it cannot be made."""
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-mavx2", "-mfma", "-mf16c",
             f"-DWEIGHTS={kind}", f"-DCACHE={cache}"]
    if torch.cpu._is_vnni_supported():
        flags += ["-mavx512vl", "-mavx512vnni"]
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpt2-from-scratch")
    library, temporary = folder / f"native-{name}.so", folder / f"native-{name}.{os.getpid()}.tmp"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["g++", *flags, SOURCE, "-o", temporary], check=True, capture_output=True, timeout=120)
        except FileNotFoundError:
            raise OSError("there is no g++ to compile it") from None
        except subprocess.SubprocessError:
            raise OSError("g++ cannot compile it") from None
        os.replace(temporary, library)
    function = ctypes.CDLL(str(library)).forward
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, pointer, pointer, number, pointer, pointer, ctypes.c_int]
    return function


def structure(name: str, fields: dict) -> type[ctypes.Structure]:
    """native.cpp's struct of this name."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Norm = structure("Norm", dict.fromkeys(("weight", "bias"), ctypes.c_void_p))
Matrix = structure("Matrix", {**dict.fromkeys(("weight", "bias", "scale", "start"), ctypes.c_void_p),
                              **dict.fromkeys(("inputs", "outputs"), ctypes.c_int64)})
Layer = structure("Layer", {"ln_1": Norm, "c_attn": Matrix, "c_proj": Matrix, "ln_2": Norm, "c_fc": Matrix, "mlp_c_proj": Matrix})
Model = structure("Model", {**dict.fromkeys(("n_layer", "n_head", "n_embd", "exact_gelu"), ctypes.c_int64),
                            "layers": ctypes.POINTER(Layer), "ln_f": Norm, "head": Matrix})


class NativeForward(Forward):
    """Steps by native.cpp. Raises OSError where it cannot be compiled."""

    def __init__(self, model: GPT, dtype: str):
        super().__init__(model, dtype)
        self.step = compiled(KINDS[dtype], "float" if self.no_cache.dtype == torch.float32 else "uint16_t")
        gpt, config = model.transformer, model.config
        self.backend, self.dtype, self.kept = "by native.cpp", dtype, []  # kept: what the structures point to
        # All matrices in one piece, as they are read one after another, in the system's large pages where it has them.
        memory = mmap.mmap(-1, 4 * (model.num_parameters() + OUTPUT_BLOCK * config.n_embd * (7 * config.n_layer + 1)))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = torch.frombuffer(memory, dtype=torch.uint8)
        layers = [Layer(self.norm(block.ln_1), self.matrix(block.attn.c_attn), self.matrix(block.attn.c_proj),
                        self.norm(block.ln_2), self.matrix(block.mlp.c_fc), self.matrix(block.mlp.c_proj)) for block in gpt.h]
        self.structures = Model(config.n_layer, config.n_head, config.n_embd, config.activation == "gelu",
                                (Layer * config.n_layer)(*layers), self.norm(gpt.ln_f), self.matrix(gpt.wte))

    def keep(self, tensor) -> int:
        """The address of a tensor, which stays."""
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def norm(self, layer) -> Norm:
        return Norm(self.keep(layer.weight), self.keep(layer.bias))

    def matrix(self, layer) -> Matrix:
        """A linear layer, or an embedding as the head, in panels."""
        weight, scale, start, group = layer.weight.detach(), None, None, 1
        outputs, inputs = weight.shape
        pad = -outputs % OUTPUT_BLOCK
        if self.dtype == "int8":
            weight, scales = quantize_rows(weight)
            scale, start = self.keep(F.pad(scales, (0, pad))), self.keep(F.pad(-64 * weight.sum(1, dtype=torch.int32), (0, pad)))
            group = 4
        else:
            weight = weight.to(getattr(torch, self.dtype))
        panels = F.pad(weight, (0, 0, 0, pad)).view(-1, PANEL, inputs // group, group).transpose(1, 2)
        size = panels.numel() * panels.element_size()
        place, self.free = self.free[:size].view(panels.dtype).view(panels.shape), self.free[-(-size // 64) * 64:]
        place.copy_(panels)
        bias = getattr(layer, "bias", None)
        bias = self.keep(torch.zeros(outputs + pad) if bias is None else F.pad(bias, (0, pad)))
        return Matrix(self.keep(place), bias, scale, start, inputs, outputs)

    def logits(self, segments: list[Segment], ids: list[int], positions: list[int], wanted: list[int]):
        x = self.embed.wte(torch.tensor(ids)) + self.embed.wpe(torch.tensor(positions))  # (R, n_embd); indexing would wake OpenMP
        caches = [(cache.kv.data_ptr(), cache.kv.size(3)) for cache, _, ids, _ in segments for _ in ids]
        rows = torch.tensor([(*cache, position) for cache, position in zip(caches, positions)])
        last, logits = torch.tensor(wanted, dtype=torch.long), torch.empty(len(wanted), self.structures.head.outputs)
        self.step(ctypes.byref(self.structures), len(x), rows.data_ptr(), x.data_ptr(), len(last), last.data_ptr(),
                  logits.data_ptr(), torch.get_num_threads())
        return logits

    def is_reusable(self, segment: Segment) -> bool:
        """Attention has one order, however many rows there are."""
        return True
