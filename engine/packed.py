"""The model's matrix products in each precision, faster than `F.linear` on a CPU: `pack_model(model, "int8")`.

A row's result never depends on the rows beside it, bit for bit (tests/test_generate.py): a text that is sampled in a crowd is the
text that is sampled alone. Activations are float32 in every precision; what is smaller are the weights, whose bytes
are what a token costs. The right kernel for each was found by measuring (benchmarks/NOTES.md), and is fixed:

- float32: oneDNN's own order of the weights, whose products take rows in any number alike.
- float16: fbgemm's, four rows at a time, up to 24: it has other kernels for the rest, which add up in another order.
- int8: fbgemm's, with a scale for each row of the weights and of the activations. Sums of whole numbers are exact.
- bfloat16: weights rounded to it, products in float32: few CPUs have units for it, and others emulate them ten times slower.
"""
import copy
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import ddp
from common.devices import allowed_cores
from model import GPT

FBGEMM_ROWS = 4  # of fbgemm's product in float16


class PackedLinear(nn.Module):
    """`nn.Linear` for inference in float32, its weight (out, in) repacked for inputs of many rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1024), bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """`nn.Linear` with a weight in float16 and everything else in float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), None), bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        count = len(rows)
        if count % FBGEMM_ROWS:
            rows = F.pad(rows, (0, 0, 0, -count % FBGEMM_ROWS))
        parts = [torch.ops.quantized.linear_dynamic_fp16(part, self.weight) for part in rows.split(6 * FBGEMM_ROWS)]
        y = (parts[0] if len(parts) == 1 else torch.cat(parts))[:count]
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 weights (out, in), the scale of each row (out,)) of weights (out, in).

    AVX2 adds up products in 16 bits. Four of inputs up to 127 fit where weights of one sign add up to at most 258: native.cpp
    takes those of inputs 0, 1, 4 and 5 of each eight together, and of 2, 3, 6 and 7.
    """
    weight = weight.detach()
    eights = F.pad(weight, (0, -weight.size(1) % 8)).view(len(weight), -1, 2, 2, 2)  # halves, pairs, in a pair
    fours = torch.maximum(eights.relu().sum((2, 4)), (-eights).relu().sum((2, 4)))
    scales = torch.maximum(weight.abs().amax(1) / 127, fours.amax((1, 2)) / 256).clamp_min(1e-12)  # rounding adds up to 2 to 256
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class Int8Linear(nn.Module):
    """`nn.Linear` with a weight of 8 bits and a scale for each of its rows; inputs are rounded to 7 bits, with a scale for each
    row too. (Seven, so that four products fit 16 bits.)"""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        whole, scales = quantize_rows(weight)
        with warnings.catch_warnings():  # torch means to move these kernels elsewhere one day
            warnings.simplefilter("ignore")
            whole = torch._make_per_channel_quantized_tensor(whole, scales.double(), torch.zeros(len(whole), dtype=torch.long), 0)
        engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
        self.weight = torch.ops.quantized.linear_prepack(whole, None)
        torch.backends.quantized.engine = engine
        self.bias = bias

    def forward(self, x):
        scale = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).clamp_min_(1e-12).div_(63)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1.0, 64, self.weight).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


class SmallBlocks(nn.Module):
    """An elementwise function, on so few numbers at a time that torch computes all of them by the same instructions."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x):
        # Torch shares 32,768 numbers or more among threads, and takes 16 at a time, the rest one by one in another way.
        rows = 1 if x.size(-1) % 16 else max(1, 32_767 // x.size(-1))
        if x.size(-2) <= rows:
            return self.function(x)
        return torch.cat([self.function(part) for part in x.split(rows, dim=-2)], dim=-2)


def pack_model(model: GPT, dtype: str = "float32") -> GPT:
    """The model with its matrices packed in `dtype`, and the rest shared with it, for inference alone; the model itself where
    that is packed already, not float32 on a CPU, sharded, under autocast, or torch comes without oneDNN."""
    weight = model.transformer.wte.weight
    if "logits" in model.__dict__ or weight.device.type != "cpu" or weight.dtype != torch.float32 or (
            ddp.is_sharded(model) or torch.is_autocast_enabled("cpu") or not hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return model
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).eval()
    kind = {"float16": HalfLinear, "int8": Int8Linear}.get(dtype, PackedLinear)
    rounded = (lambda w: w.bfloat16().float()) if dtype == "bfloat16" else (lambda w: w)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(rounded(child.weight), child.bias))
            elif name == "act":
                setattr(parent, name, SmallBlocks(child))
    object.__setattr__(model, "logits", kind(rounded(weight)))  # in place of the method, and no module of the model
    return model


def supports_dtype(dtype: str, device: torch.device) -> bool:
    """Whether `pack_model` has products in this precision there."""
    if dtype == "int8" or (dtype == "float16" and device.type == "cpu"):
        return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    return True


def use_allowed_cores():
    """Has torch use as many threads as this process may use cores, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(allowed_cores())
