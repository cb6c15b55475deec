"""forward.py's step in C++, for CPUs with AVX2: `make_forward(model, "int8")` uses it if it can.

In PyTorch a token takes some 500 small calls, which cost more than their arithmetic. native.cpp
computes the step in one call. It is compiled on first use, which takes two seconds, and kept in the
user's cache folder.
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

# dtype -> the C++ struct that multiplies weights of this dtype
WEIGHT_TYPES = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int8": "Int8"}

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
PANEL = 16  # outputs whose weights are interleaved in memory
OUTPUT_BLOCK = 64  # outputs that a thread computes at a time; matrices are padded to a multiple


def make_forward(model: GPT, dtype: str) -> Forward:
    """The fastest step available for the model: NativeForward, else Forward."""
    weight = model.transformer.wte.weight
    torch_forward = Forward(model, dtype)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or ddp.is_sharded(model):
        return torch_forward
    try:
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            raise OSError("this CPU has no AVX2")
        if model.config.n_embd // model.config.n_head % 8:
            raise OSError("the head size is not a multiple of 8")
        return NativeForward(model, dtype)
    except OSError as error:
        torch_forward.backend = f"by torch, several times slower than by native.cpp: {error}"
        return torch_forward


@functools.cache
def load_library(weight_type: str, cache_type: str):
    """Compile native.cpp for these types, or reuse an earlier build, and return its `forward`.

    Raises OSError if it cannot be compiled.
    """
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-mavx2", "-mfma", "-mf16c",
             f"-DWEIGHTS={weight_type}", f"-DCACHE={cache_type}"]
    if torch.cpu._is_vnni_supported():
        flags += ["-mavx512vl", "-mavx512vnni"]
    # the file name changes with the source and the flags
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(cache_home, "gpt2-from-scratch", f"native-{digest}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        command = ["g++", *flags, SOURCE, "-o", temporary]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        except FileNotFoundError:
            raise OSError("g++ is not installed") from None
        except subprocess.SubprocessError:
            raise OSError("g++ cannot compile it") from None
        os.replace(temporary, library)
    function = ctypes.CDLL(str(library)).forward
    function.argtypes = [
        POINTER, INTEGER, POINTER, POINTER, INTEGER, POINTER, POINTER, ctypes.c_int]
    return function


# --------------------------------------------------------------------------------------------------
# native.cpp's structs, field by field

def c_struct(name: str, fields: dict) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Norm = c_struct("Norm", {"weight": POINTER, "bias": POINTER})
Matrix = c_struct("Matrix", {"weight": POINTER, "bias": POINTER, "scale": POINTER, "start": POINTER,
                             "inputs": INTEGER, "outputs": INTEGER})
Layer = c_struct("Layer", {"ln_1": Norm, "c_attn": Matrix, "c_proj": Matrix, "ln_2": Norm,
                           "c_fc": Matrix, "mlp_c_proj": Matrix})
Model = c_struct("Model", {
    "n_layer": INTEGER, "n_head": INTEGER, "n_embd": INTEGER, "exact_gelu": INTEGER,
    "layers": ctypes.POINTER(Layer), "ln_f": Norm, "head": Matrix})


class NativeForward(Forward):
    """Steps computed by native.cpp. Raises OSError if it cannot be compiled."""

    def __init__(self, model: GPT, dtype: str):
        super().__init__(model, dtype)
        cache_type = "float" if self.empty_kv.dtype == torch.float32 else "uint16_t"
        self.step = load_library(WEIGHT_TYPES[dtype], cache_type)
        self.backend = "by native.cpp"
        self.tensors = []  # keeps alive what the structs point to
        config = model.config

        # allocate all matrices in one block (a step reads them in order), on huge pages if possible
        padding = OUTPUT_BLOCK * config.n_embd * (7 * config.n_layer + 1)
        memory = mmap.mmap(-1, 4 * (model.num_parameters() + padding))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.free = torch.frombuffer(memory, dtype=torch.uint8)

        # fill the structs
        gpt = model.transformer
        layers = []
        for block in gpt.h:
            attn, mlp = block.attn, block.mlp
            layers.append(Layer(
                self.norm(block.ln_1), self.matrix(attn.c_attn), self.matrix(attn.c_proj),
                self.norm(block.ln_2), self.matrix(mlp.c_fc), self.matrix(mlp.c_proj)))
        self.structs = Model(
            config.n_layer, config.n_head, config.n_embd, config.activation == "gelu",
            (Layer * config.n_layer)(*layers), self.norm(gpt.ln_f), self.matrix(gpt.wte))

    def address(self, tensor) -> int:
        """The address of the tensor's data, which stays valid as long as this object."""
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def norm(self, layer) -> Norm:
        return Norm(self.address(layer.weight), self.address(layer.bias))

    def matrix(self, layer) -> Matrix:
        """The weights of an `nn.Linear`, or of an embedding as the head, laid out in panels."""
        # convert the weights
        weight = layer.weight.detach()
        outputs, inputs = weight.shape
        pad = -outputs % OUTPUT_BLOCK
        if self.dtype == "int8":
            weight, scales = quantize_rows(weight)
            scale = self.address(F.pad(scales, (0, pad)))
            # inputs are stored with 64 added: start each sum at minus 64 times the row's weights
            start = self.address(F.pad(-64 * weight.sum(1, dtype=torch.int32), (0, pad)))
            group = 4  # consecutive inputs whose weights lie together
        else:
            weight = weight.to(getattr(torch, self.dtype))
            scale = start = None
            group = 1

        # (out, in) -> panels (out / PANEL, in / group, PANEL, group)
        weight = F.pad(weight, (0, 0, 0, pad))
        panels = weight.view(-1, PANEL, inputs // group, group).transpose(1, 2)

        # copy the panels into the block of memory, aligned to 64 bytes
        size = panels.numel() * panels.element_size()
        stored = self.free[:size].view(panels.dtype).view(panels.shape)
        self.free = self.free[-(-size // 64) * 64:]
        stored.copy_(panels)
        bias = getattr(layer, "bias", None)
        bias = torch.zeros(outputs + pad) if bias is None else F.pad(bias, (0, pad))
        return Matrix(self.address(stored), self.address(bias), scale, start, inputs, outputs)

    def logits(self, segments: list[Segment], ids: list[int], positions: list[int],
               output_rows: list[int]):
        # call the modules: plain indexing of the weights would wake OpenMP's threads
        gpt = self.unpacked.transformer
        x = gpt.wte(torch.tensor(ids)) + gpt.wpe(torch.tensor(positions))  # (R, C)

        # native.cpp's struct Row: cache address, capacity, position
        rows = []
        for segment in segments:
            kv = segment.cache.kv
            stop = segment.start + len(segment.ids)
            rows += [(kv.data_ptr(), kv.size(3), i) for i in range(segment.start, stop)]
        rows = torch.tensor(rows)  # (R, 3) int64

        # run the step
        selected = torch.tensor(output_rows, dtype=torch.long)
        logits = torch.empty(len(selected), self.structs.head.outputs)
        self.step(ctypes.byref(self.structs), len(x), rows.data_ptr(), x.data_ptr(), len(selected),
                  selected.data_ptr(), logits.data_ptr(), torch.get_num_threads())
        return logits

    def is_reusable(self, segment: Segment) -> bool:
        """Always: attention adds up in one order, whatever the number of rows."""
        return True
