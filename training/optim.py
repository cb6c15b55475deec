"""Optimizers and learning-rate schedules: AdamW, Muon; warm-up, then constant, cosine or WSD."""
import math
from collections import defaultdict

import torch

from model import GPT
from training.config import TrainConfig


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers for all of the model's parameters: [AdamW], or [AdamW, Muon].

    "adamw": AdamW for all parameters, as in GPT-3 (arXiv 2005.14165, appendix B).
    "muon": Muon for the weight matrices of the blocks; AdamW for embeddings, gains and biases.

    Weight decay applies to matrices and embeddings, not to gains and biases. The learning rate of
    the embeddings is `embedding_rate` times that of the other parameters.
    """
    weight_decay = config.weight_decay
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # gains and biases

    adamw_groups = [
        {"params": embeddings, "weight_decay": weight_decay, "lr_scale": config.embedding_rate},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        adamw_groups.append({"params": hidden, "weight_decay": weight_decay})
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(adamw_groups, betas=betas, eps=1e-8, fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon(hidden, weight_decay=weight_decay)]


# --------------------------------------------------------------------------------------------------
# Muon

class Muon(torch.optim.Optimizer):
    """Muon, "MomentUm Orthogonalized by Newton-Schulz", for weight matrices.

    For a matrix W (m, n) with gradient G, momentum buffer M and momentum mu, a step is

        M <- mu M + (1 - mu) G              momentum
        D  = mu M + (1 - mu) G              Nesterov momentum
        O  = orthogonalize(D)               all singular values near 1
        W <- W - lr * weight_decay * W
        W <- W - lr * 0.2 sqrt(max(m, n)) * O

    A few directions dominate a gradient matrix. Orthogonalizing gives the update about the same
    size in every direction (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The
    factor 0.2 sqrt(max(m, n)) gives it the size of an AdamW update, so that both optimizers can
    share a learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    It equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which torch 2.8 lacks, except
    that it uses bfloat16 on CUDA only. torch's version always uses bfloat16, which takes 20 times
    as long on a CPU without bfloat16 instructions.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        # train.py sets found_inf to 1 if the gradient is not finite (torch's fused AdamW reads it
        # too). The step is then multiplied by 0 on the device, so the CPU need not wait for it.
        device = self.param_groups[0]["params"][0].device
        found_inf = getattr(self, "found_inf", torch.zeros((), device=device))
        active = 1 - found_inf

        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                p.grad.masked_fill_(found_inf > 0, 0)  # as 0 * NaN is NaN
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)

                # Nesterov momentum; a.lerp(b, w) is (1 - w) a + w b
                buffer = state["momentum_buffer"].lerp_(p.grad, (1 - momentum) * active)
                direction = p.grad.lerp(buffer, momentum)

                # weight decay, then the orthogonalized update
                update = orthogonalize(direction) * active
                p.mul_(1 - lr * group["weight_decay"] * active)
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Brings all singular values of a matrix (m, n) near 1: about U V^T, if its SVD is U S V^T.

    It takes five Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X. Each applies the
    polynomial a s + b s^3 + c s^5 to every singular value s. The coefficients are Jordan et al.'s:
    they raise small singular values fast, and the results lie between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x.T if is_tall else x  # (k, l) with k <= l, which makes X X^T small
    x = x / x.norm().clamp(min=1e-7)  # singular values are at most 1 now

    if x.is_cuda or x.size(0) == x.size(1):
        for _ in range(5):
            gram = x @ x.T  # (k, k)
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
            x = torch.addmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    else:
        # The same steps in 0.6 of the time. A step multiplies X by P = a I + b G + c G^2, a (k, k)
        # matrix that commutes with G. So the next G is P G P, and X can be multiplied last, once.
        gram = x @ x.T  # (k, k)
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        product = identity
        for _ in range(5):
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
            product = polynomial @ product
            gram = polynomial @ gram @ polynomial
        x = product @ x
    return (x.T if is_tall else x).to(matrix.dtype)


# --------------------------------------------------------------------------------------------------
# Learning rate

def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 0.

    The warm-up rises linearly to the peak, `learning_rate`. After it, the schedules differ:

    "constant": stays at the peak.
    "cosine": falls along half a cosine to min_lr_ratio * peak.
    "wsd" (warm-up, stable, decay): stays at the peak, then falls linearly to min_lr_ratio * peak
    over the last decay_ratio of the steps (Hägele et al. 2024, arXiv 2405.18392).
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak

    # how far the rate is above its minimum, from 1 at the peak to 0 at the end
    if config.schedule == "wsd":
        decay_steps = max(1e-9, config.max_steps - config.decay_start)
        height = min(1.0, (config.max_steps - step) / decay_steps)
    else:
        steps = max(1, config.max_steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def set_learning_rate(optimizers, lr: float):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


# --------------------------------------------------------------------------------------------------
# State in a checkpoint

def named_state(model: GPT, optimizers) -> dict[str, torch.Tensor]:
    """The state of the optimizers as {"<parameter name>/<key>": tensor}, to save as safetensors.

    For example, "transformer.wte.weight/exp_avg" is AdamW's first moment of the token embedding.
    """
    names = {p: name for name, p in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, tensor in state.items():
                tensors[f"{names[p]}/{key}"] = tensor
    return tensors


def load_named_state(model: GPT, optimizers, tensors: dict[str, torch.Tensor]):
    """Loads a state that `named_state` returned into the optimizers."""
    # group the tensors by parameter
    states = defaultdict(dict)
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        states[parameter_name][key] = tensor

    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        # torch numbers the parameters of an optimizer in the order of its groups
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {number: states[names[p]] for number, p in enumerate(parameters)}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
