"""Cross-entropy over a large vocabulary, with only a few rows of logits in memory at a time."""
import torch
import torch.nn.functional as F

# rows of logits in memory at a time, by device
LOGIT_ROWS = {"cpu": 512, "cuda": 8192, "mps": 2048}


def cross_entropy(x, weight, targets):
    """Mean cross-entropy, in nats, of the logits F.linear(x, weight).

    x (N, C) holds hidden states, weight (V, C) the output head, targets (N,) token ids.
    """
    device = x.device.type
    rows = LOGIT_ROWS.get(device, 2048)
    if len(x) <= rows:
        return F.cross_entropy(F.linear(x, weight).float(), targets)
    if torch.is_autocast_enabled(device):  # which has no effect inside a torch.autograd.Function
        x = x.to(torch.get_autocast_dtype(device))
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(x, weight, targets, rows, needs_gradient)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same cross-entropy, computed `rows` rows of logits at a time.

    All N x V logits would be by far the largest tensor of a training step. The forward pass also
    computes the gradients, while it has the logits: the backward pass would have to compute the
    logits a second time.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows: int, needs_gradient: bool):
        sum_dtype = torch.promote_types(x.dtype, torch.float32)  # of everything that is summed
        w = weight.to(x.dtype)
        total = torch.zeros((), device=x.device, dtype=sum_dtype)
        grad_x = grad_weight = None
        if needs_gradient:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype)

        for first in range(0, len(x), rows):
            x_rows = x[first:first + rows]  # (rows, C)
            target = targets[first:first + rows, None]  # (rows, 1)
            logits = F.linear(x_rows, w)  # (rows, V)
            logprobs = F.log_softmax(logits, dim=-1, dtype=sum_dtype)  # (rows, V)
            del logits
            total -= logprobs.gather(1, target).sum()
            if needs_gradient:
                # the gradient of the summed loss by the logits is softmax - one_hot(target)
                minus_one = torch.full_like(target, -1, dtype=sum_dtype)
                grad_logits = logprobs.exp_().scatter_add_(1, target, minus_one).to(x.dtype)
                grad_x[first:first + rows] = grad_logits @ w
                if x.dtype == sum_dtype:
                    grad_weight.addmm_(grad_logits.T, x_rows)
                else:
                    grad_weight += grad_logits.T @ x_rows
                del grad_logits
            del logprobs  # free the memory before the next rows need it

        if needs_gradient:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_x, grad_weight)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors  # of the sum over N rows
        scale = grad / len(grad_x)
        return grad_x * scale, grad_weight * scale, None, None, None
