"""The cross-entropy of a large vocabulary, without all of its logits in memory at a time."""
import torch
import torch.nn.functional as F

LOGIT_ROWS = {"cpu": 512, "cuda": 8192}  # of logits that exist at a time


def cross_entropy(x, weight, targets):
    """Mean cross-entropy, nats, of the logits `F.linear(x, weight)` of x (N, C) and weight (V, C) for targets (N,)."""
    rows = LOGIT_ROWS.get(x.device.type, 2048)
    if len(x) <= rows:
        return F.cross_entropy(F.linear(x, weight).float(), targets)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(x, weight, targets, rows, needs_gradient)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same a few rows at a time: N · V logits would be the largest tensor of a step by far. The gradient is computed in the
    forward pass, while the logits are there, so that no product is done twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows: int, needs_gradient: bool):
        exact = torch.promote_types(x.dtype, torch.float32)  # what sums are in
        w, total = weight.to(x.dtype), torch.zeros((), device=x.device, dtype=exact)
        grad_x, grad_weight = (torch.empty_like(x), torch.zeros_like(weight, dtype=exact)) if needs_gradient else (None, None)
        for first in range(0, len(x), rows):
            part, target = x[first:first + rows], targets[first:first + rows, None]
            logprobs = F.log_softmax(F.linear(part, w), dim=-1, dtype=exact)  # (rows, V)
            total -= logprobs.gather(1, target).sum()
            if needs_gradient:
                grad = logprobs.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logprobs.dtype)).to(x.dtype)
                grad_x[first:first + rows] = grad @ w
                if x.dtype == exact:
                    grad_weight.addmm_(grad.T, part)
                else:
                    grad_weight += grad.T @ part
                del grad
            del logprobs  # before the next rows' come
        ctx.save_for_backward(grad_x, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        scale = grad / len(ctx.saved_tensors[0])
        return *(part * scale for part in ctx.saved_tensors), None, None, None
