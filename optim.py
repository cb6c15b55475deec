"""What turns gradients into updates: parameter groups, AdamW or Muon, the learning rate of each step."""
import math

import torch

from errors import UserError


def build_optimizers(model, name: str, weight_decay: float, betas: tuple[float, float]) -> list[torch.optim.Optimizer]:
    """One or two optimizers over all of the model's parameters; their learning rate is set at each step.

    adamw: as GPT-3 was trained, weight decay on the matrices alone (arXiv 2005.14165, appendix B).
    muon: the hidden matrices' updates orthogonalised (Jordan et al. 2024), scaled so that AdamW's learning rate fits
    them too (Liu et al. 2025, arXiv 2502.16982); AdamW for embeddings, gains and biases.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = []
    if name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}.")
        hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        inside = set(map(id, hidden))
        matrices = [p for p in matrices if id(p) not in inside]
        optimizers.append(torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True), *optimizers]


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int, floor: float) -> float:
    """The rate of update `step` (0 is the first): a linear warm-up, then "constant", or "cosine" down to floor * peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizers, rate: float):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def named_state(model, optimizers) -> dict[str, torch.Tensor]:
    """The optimizers' tensors by name, `<parameter>/<what>`, as a safetensors file can hold them."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}/{key}": value for optimizer in optimizers
            for p, state in optimizer.state.items() for key, value in state.items()}


def load_named_state(model, optimizers, tensors: dict[str, torch.Tensor]):
    """Gives the optimizers back what `named_state` took."""
    names = {p: name for name, p in model.named_parameters()}
    by_parameter: dict[str, dict] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        by_parameter.setdefault(parameter, {})[key] = value
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {i: by_parameter[names[p]] for i, p in enumerate(parameters) if names[p] in by_parameter}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
