"""Brings weights to our names and orientation, and builds the model from them."""
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.errors import UserError
from model import GPT, GPTConfig

# what reading a damaged file can raise
DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, OSError,
          RuntimeError, SafetensorError)

# matrices that Hugging Face's GPT-2 keeps in a Conv1D, as (in, out)
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                  "mlp.c_proj.weight")


def transpose_conv1d(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts nn.Linear's (out, in) matrices to Conv1D's (in, out), or back."""
    return {name: w.t() if name.endswith(CONV1D_WEIGHTS) else w for name, w in state.items()}


def cast_weight(name: str, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts the weight to `dtype`. Raises UserError if a value is too large for it."""
    w = w.detach().cpu().to(dtype)
    if not w.isfinite().all():
        raise UserError(f"{name} has values that {dtype} cannot hold: choose bfloat16 or float32.")
    return w


def normalize_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a GPT-2's weights to ours, and drops the constant causal masks and the tied head.

    `torch.compile`, DistributedDataParallel and samkeet's wrapper add prefixes to the names;
    Hugging Face's GPT2Model leaves out `transformer.`.
    """
    ours = {}
    for name, w in state.items():
        bare = re.sub(r"^((_orig_mod|module|model|transformer)\.)*", "", name)
        if bare.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        ours[bare if bare.startswith("lm_head.") else f"transformer.{bare}"] = w
    head = ours.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, ours["transformer.wte.weight"]):
        raise ValueError("its head is not tied to its embedding")
    return ours


def build_model(config: dict, state: dict[str, torch.Tensor], source: Path) -> GPT:
    """The model with these fields of a GPTConfig and these weights, in float32.

    Raises UserError if they do not fit each other, or if a weight is not finite.
    """
    try:
        config = GPTConfig(**config)
        # count the layers first: a damaged n_layer could ask for a billion of them
        layers = {name.split(".")[2] for name in state if ".h." in name}
        is_dense = all(w.is_floating_point() and w.layout == torch.strided and w.is_cpu
                       for w in state.values())
        if len(layers) != config.n_layer or not is_dense:
            raise ValueError
        # build on the meta device, so that no memory is allocated twice
        with torch.device("meta"):
            model = GPT(config)
        weights = {name: w.float().contiguous() for name, w in state.items()}
        model.load_state_dict(weights, assign=True)
    except DAMAGE:
        raise UserError(f"The weights and the configuration in {source} do not fit each other: "
                        "one of them is damaged or belongs to another model.") from None
    for name, w in model.named_parameters():
        if not w.isfinite().all():
            raise UserError(f"The weights in {source} are damaged: {name} holds values that are "
                            "not finite.")
    return model
