"""What turns gradients into updates: parameter groups, AdamW or Muon, the learning rate of each step."""
import math

import torch


def build_optimizers(model, name: str, weight_decay: float, betas: tuple[float, float],
                     embedding_rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """One or two optimizers over all of the model's parameters; their learning rate is set at each step, that of the embeddings
    `embedding_rate` times as high.

    adamw: as GPT-3 was trained (arXiv 2005.14165, appendix B); the matrices decay, the embeddings among them.
    muon: the hidden matrices' updates orthogonalised (Jordan et al. 2024), scaled so that AdamW's learning rate fits
    them too (Liu et al. 2025, arXiv 2502.16982); AdamW for embeddings, gains and biases.
    """
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": embeddings, "weight_decay": weight_decay, "rate": embedding_rate},
              {"params": hidden if name == "adamw" else [], "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=1e-8, fused=True)
    return [adamw, Muon(hidden, weight_decay=weight_decay)] if name == "muon" else [adamw]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: the update moves every direction of a matrix by about the same amount.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw", step for step, but the products are in bfloat16 only on
    CUDA: on a CPU without bfloat16 units that one takes 20 times as long. torch 2.8 has none.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        found_inf = getattr(self, "found_inf", None)  # 1 where the update is to be skipped, as torch's AdamW has it too
        for group in self.param_groups:
            for p in group["params"]:
                if found_inf is not None:
                    p.grad.masked_fill_(found_inf > 0, 0)
                take = 1 if found_inf is None else 1 - found_inf
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, torch.as_tensor((1 - group["momentum"]) * take, device=p.device))
                direction = orthogonalize(p.grad.lerp(average, group["momentum"])) * take
                p.mul_(1 - group["lr"] * group["weight_decay"] * take)
                p.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with all its singular values brought near 1, by five Newton-Schulz steps (Jordan et al. 2024)."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    wide = x.T if x.size(0) > x.size(1) else x
    wide = wide / wide.norm().clamp(min=1e-7)
    if x.is_cuda or x.size(0) == x.size(1):
        for _ in range(5):
            gram = wide @ wide.T  # (min(m, n), min(m, n))
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    else:  # each step multiplies by a polynomial of gram, and these commute: the small matrices first takes 0.6 of the time
        gram, identity = wide @ wide.T, torch.eye(len(wide), dtype=x.dtype)
        steps = identity
        for _ in range(5):
            step = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315).add_(identity, alpha=3.4445)
            steps, gram = step @ steps, step @ gram @ step
        wide = steps @ wide
    return (wide.T if x.size(0) > x.size(1) else wide).to(matrix.dtype)


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """The rate of update `step` (0 is the first): a linear warm-up, then "constant", "cosine" down to min_ratio * peak, or "wsd",
    constant but for a straight line down to it over the last fifth (Hägele et al. 2024, arXiv 2405.18392)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        falling = max(1e-9, max_steps - falls_from(warmup_steps, max_steps))
        return peak * (min_ratio + (1 - min_ratio) * min(1.0, (max_steps - step) / falling))
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def falls_from(warmup_steps: int, max_steps: int) -> float:
    """The step up to which wsd's rate does not depend on max_steps."""
    return max(warmup_steps, 0.8 * max_steps)


def set_learning_rate(optimizers, rate: float):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)


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
