"""A state dict of weights under our names, in our orientation, and the model built from it."""
import re
from pathlib import Path

import torch

from common.errors import UserError
from model import GPT, GPTConfig

DAMAGE = (ValueError, KeyError, AttributeError, TypeError, OSError, RuntimeError)  # what reading a damaged file can raise

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From our orientation to Conv1D's, or back."""
    return {name: w.t() if name.endswith(TRANSPOSED) else w for name, w in state.items()}


def fitted(name: str, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`. Raises UserError where a value is too large for it."""
    w = w.detach().cpu().to(dtype)
    if not w.isfinite().all():
        raise UserError(f"{name} has values that {dtype} cannot hold: choose bfloat16 or float32.")
    return w


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
