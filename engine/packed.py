"""Faster matrix products for inference on a CPU, in each precision: `pack_model(model, "int8")`.

A row's result never depends on the other rows, bit for bit (tests/test_generate.py), so a prompt
gets the same text in any batch. Activations are float32 in every precision; only the weights are
smaller, because the time of a token is the time to read them. The kernel for each precision was
chosen by measurement (benchmarks/NOTES.md) and is fixed:

- float32: oneDNN with prepacked weights. It treats rows alike, whatever their number.
- float16: fbgemm, four rows at a time and at most 24 per call. For other numbers of rows fbgemm has
  kernels that add up in another order.
- int8: fbgemm, with a scale per row of the weights and of the activations. Integer sums are exact.
- bfloat16: weights rounded to bfloat16 and multiplied in float32. Few CPUs have bfloat16 units, and
  emulation is ten times slower.
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

FBGEMM_ROWS = 4  # rows that fbgemm's float16 kernel takes together
FBGEMM_MAX_ROWS = 24  # rows per call up to which it uses that kernel


# --------------------------------------------------------------------------------------------------
# Layers

class PackedLinear(nn.Module):
    """`nn.Linear` for inference in float32, with its weight (out, in) in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1024)
        self.bias = bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """`nn.Linear` for inference, with a float16 weight and everything else in float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), None)
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))  # (R, in)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % FBGEMM_ROWS))
        parts = [torch.ops.quantized.linear_dynamic_fp16(part, self.weight)
                 for part in padded.split(FBGEMM_MAX_ROWS)]
        y = torch.cat(parts)[:len(rows)]  # (R, out)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights (out, in): returns int8 weights (out, in) and the scale of each row (out,).

    AVX2 sums products in 16 bits, which overflow above 32,767. native.cpp sums four products of
    inputs up to 127, so four weights of one sign may add up to at most 258; a row's scale is large
    enough for that. The four are inputs 0, 1, 4 and 5 of every eight, and inputs 2, 3, 6 and 7.
    """
    weight = weight.detach()
    # the largest sum of four weights of one sign
    padded = F.pad(weight, (0, -weight.size(1) % 8))
    groups = padded.view(len(weight), -1, 2, 2, 2)  # (out, in / 8, half, pair, in the pair)
    positive = groups.relu().sum((2, 4))  # (out, in / 8, pair)
    negative = (-groups).relu().sum((2, 4))
    largest_sum = torch.maximum(positive, negative).amax((1, 2))  # (out,)
    # 256 leaves room for rounding, which adds at most 2
    scales = torch.maximum(weight.abs().amax(1) / 127, largest_sum / 256).clamp_min(1e-12)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class Int8Linear(nn.Module):
    """`nn.Linear` for inference, with an int8 weight and a scale for each of its rows.

    Inputs are rounded to 7 bits with a scale per row, so that four products fit into 16 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        weight, scales = quantize_rows(weight)
        zero_points = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # torch announces that these kernels will move
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(
                weight, scales.double(), zero_points, 0)
        previous_engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        self.weight = torch.ops.quantized.linear_prepack(weight, None)
        torch.backends.quantized.engine = previous_engine
        self.bias = bias

    def forward(self, x):
        # the scale maps each row to -63 ... 63
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
        scale = largest.clamp_min_(1e-12).div_(63)
        # quantize with zero point 64, multiply, dequantize
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = linear(x / scale, 1.0, 64, self.weight).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


class ChunkedActivation(nn.Module):
    """An activation function, applied to so few rows at a time that every row is computed alike.

    From 32,768 elements on, torch splits the work among threads. It computes 16 elements at a time,
    and those left over at the end with other instructions.
    """

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x):
        rows = 1 if x.size(-1) % 16 else max(1, 32_767 // x.size(-1))
        if x.size(-2) <= rows:
            return self.function(x)
        return torch.cat([self.function(part) for part in x.split(rows, dim=-2)], dim=-2)


# --------------------------------------------------------------------------------------------------
# Models

def pack_model(model: GPT, dtype: str = "float32") -> GPT:
    """A copy of the model for inference, with its matrices packed in `dtype`. It shares the rest.

    Returns the model itself if it is packed already, sharded, under autocast, or not float32 on a
    CPU, or if torch was built without oneDNN.
    """
    weight = model.transformer.wte.weight
    is_packed = "logits" in model.__dict__
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if is_packed or not on_cpu or ddp.is_sharded(model) or torch.is_autocast_enabled("cpu"):
        return model
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return model

    def pack(weight, bias=None):
        if dtype == "bfloat16":
            weight = weight.bfloat16().float()
        return {"float16": HalfLinear, "int8": Int8Linear}.get(dtype, PackedLinear)(weight, bias)

    # copy the modules, but not the parameters
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, pack(child.weight, child.bias))
            elif name == "act":
                setattr(parent, name, ChunkedActivation(child))
    # replace the method `logits`, without registering a module
    object.__setattr__(model, "logits", pack(weight))
    return model


def supports_dtype(dtype: str, device: torch.device) -> bool:
    """Whether `pack_model` supports this precision on the device."""
    if dtype == "int8" or (dtype == "float16" and device.type == "cpu"):
        return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    return True


def use_allowed_cores():
    """Set torch's threads to the cores this process may use, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(allowed_cores())
