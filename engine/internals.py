"""What a GPT computes while it reads a text: attention, logit lens, direct logit attribution.

    trace = trace_tokens(model, ids)
    trace.attention                         # (L, nh, T, T)
    trace.lens([-1])                        # (L + 1, 1, V): what each layer would predict next
    trace.contributions(-1, wte[token])     # what each head and MLP adds to the token's logit

`model` is the GPT as `load_model` returns it (`Engine.model`), not a packed copy: the weights are
those of the file, even if the engine generates with int8. Shapes: L layers, nh heads of size hs,
T tokens, C = n_embd, V = vocab_size.
"""
import copy
import dataclasses
import math

import torch

from model import GPT


@dataclasses.dataclass(frozen=True)
class Contributions:
    """What each part of a model adds to a logit. The parts sum to the logit."""
    token: torch.Tensor  # () the token embedding
    position: torch.Tensor  # () the position embedding
    heads: torch.Tensor  # (L, nh)
    attention_bias: torch.Tensor  # (L,) the bias of the projection that all heads share
    mlp: torch.Tensor  # (L,)
    final_bias: torch.Tensor  # () the bias of the final LayerNorm

    def total(self) -> float:
        return float(sum(getattr(self, field.name).sum() for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a model computed for T tokens."""
    model: GPT
    ids: list[int]
    attention: torch.Tensor  # (L, nh, T, T) weights: a token (row) attends to a token (column)
    heads: torch.Tensor  # (L, nh, T, hs) the heads' outputs, before the projection
    mlp: torch.Tensor  # (L, T, C) the MLPs' outputs
    residual: torch.Tensor  # (L + 1, T, C) the residual stream: the embeddings, then after a block

    @torch.inference_mode()
    def lens(self, rows: list[int]) -> torch.Tensor:
        """Logits (L + 1, R, V) of the next token if the layers ended here: embeddings, block 1, …

        The last ones are the model's own. This is the logit lens (nostalgebraist 2020,
        https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru).
        """
        return self.model.logits(self.model.transformer.ln_f(self.residual[:, rows])).float()

    @torch.inference_mode()
    def contributions(self, row: int, direction: torch.Tensor) -> Contributions:
        """What each part adds to the logit hidden @ direction, after the token at `row`.

        A `direction` (C,) of wte[a] gives the logit of token a; wte[a] - wte[b] gives a difference
        of logits. All parts add to the residual stream, and the final LayerNorm is linear once its
        scale is frozen at the value it has here, so the logit is a sum over the parts. This is
        direct logit attribution (Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework).
        """
        transformer = self.model.transformer
        ln_f = transformer.ln_f
        direction = direction.float()

        # fold the LayerNorm's scale, weight and centering into the direction
        scale = (self.residual[-1, row].float().var(correction=0) + ln_f.eps).rsqrt()  # ()
        folded = direction * ln_f.weight.float() * scale  # (C,)
        folded = folded - folded.mean()

        # the heads share a projection (C, C), whose columns belong to one head after another
        heads, attention_bias = [], []
        for block, y in zip(transformer.h, self.heads[:, :, row].float()):  # y (nh, hs)
            c_proj = block.attn.c_proj
            read = (folded @ c_proj.weight.float()).view_as(y)  # (nh, hs)
            heads.append((y * read).sum(-1))  # (nh,)
            attention_bias.append(c_proj.bias.float() @ folded)
        position = row % len(self.ids)  # `row` may count from the end
        return Contributions(
            token=transformer.wte.weight[self.ids[row]].float() @ folded,
            position=transformer.wpe.weight[position].float() @ folded,
            heads=torch.stack(heads),
            attention_bias=torch.stack(attention_bias),
            mlp=self.mlp[:, row].float() @ folded,
            final_bias=ln_f.bias.float() @ direction)


@torch.inference_mode()
def trace_tokens(model: GPT, ids: list[int]) -> Trace:
    """Runs the model on T token ids, at most block_size of them, and keeps what it computes."""
    attention, heads, mlp, residual = [], [], [], []
    T = len(ids)
    device = model.transformer.wte.weight.device
    future = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)

    def attend(layer, q, k, v):  # (1, nh, T, hs) each
        scores = (q @ k.mT).float() / math.sqrt(q.size(-1))  # (1, nh, T, T)
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        y = weights.to(v.dtype) @ v  # (1, nh, T, hs)
        attention.append(weights[0])
        heads.append(y[0])
        return y

    def keep_input(module, inputs):
        residual.append(inputs[0][0])  # (T, C)

    # put the hooks on a copy, which shares the parameters: other threads may run the model now
    observed = copy.deepcopy(model, memo={id(p): p for p in model.parameters()}).eval()
    observed.transformer.ln_f.register_forward_pre_hook(keep_input)
    for block in observed.transformer.h:
        block.register_forward_pre_hook(keep_input)
        block.mlp.register_forward_hook(lambda _, inputs, output: mlp.append(output[0]))  # (T, C)
    observed.hidden(torch.tensor([ids], device=device), attend=attend)
    return Trace(model, ids, *map(torch.stack, (attention, heads, mlp, residual)))
