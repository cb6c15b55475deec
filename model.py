"""GPT-2: learned position embeddings, pre-norm LayerNorm, GELU (tanh), biases and a tied head.

    model = GPT(GPTConfig())         # GPT-2 124M with random weights
    logits, _ = model(idx)           # idx (B, T) int64 -> logits (B, T, vocab_size)
    _, loss = model(idx, targets)    # mean cross-entropy in nats per token

Parameters are named as in OpenAI's release and Hugging Face (`transformer.h.0.attn.c_attn.weight`),
with weights in `nn.Linear`'s (out, in) layout. Shapes in comments: B sequences, T tokens,
C = n_embd, nh heads of size hs = C / nh, V = vocab_size.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from training.loss import cross_entropy

ACTIVATIONS = {"gelu_new": nn.GELU(approximate="tanh"), "gelu": nn.GELU()}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model. Raises UserError if they are invalid."""
    block_size: int = 1024  # maximum context length, in tokens
    vocab_size: int = 50257  # to train from scratch: 50304, a multiple of 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    activation: str = "gelu_new"  # the tanh approximation; "gelu" is exact, as nanoGPT uses it

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be an integer of at least 1, not {value!r}.")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}).")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and less than 1, not {self.dropout!r}.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation must be gelu_new or gelu, not {self.activation!r}.")


# GPT-2's four sizes and the eight of the GPT-3 paper (arXiv 2005.14165, table 2.1). Two rows of
# that table are inconsistent: n_head * d_head is 3072 for XL, whose d_model is 2048, and 5120 for
# 13B, whose d_model is 5140. We keep d_model, because the published parameter counts require it:
# XL gets 16 heads of the table's d_head 128; 13B gets 20 heads of 257 (5140 / 40 is not whole).
SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "gpt3-small": GPTConfig(block_size=2048, n_layer=12, n_head=12, n_embd=768),
    "gpt3-medium": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1024),
    "gpt3-large": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1536),
    "gpt3-xl": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=2048),
    "gpt3-2.7b": GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=2560),
    "gpt3-6.7b": GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=4096),
    "gpt3-13b": GPTConfig(block_size=2048, n_layer=40, n_head=20, n_embd=5140),
    "gpt3-175b": GPTConfig(block_size=2048, n_layer=96, n_head=96, n_embd=12288),
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token attends to itself and to earlier tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, attend=None):
        """x (B, T, C) -> (B, T, C). For `mask` and `attend` see `GPT.hidden`."""
        B, T, C = x.shape
        # compute query, key and value, and split them into heads
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # attend: softmax(q @ k.T / sqrt(hs)) @ v
        if attend is not None:
            y = attend(q, k, v)  # (B, nh, T, hs)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                dropout_p=self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        # concatenate the heads and project
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.act(self.c_fc(x))  # (B, T, 4 * C)
        x = self.c_proj(x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, attend=None):
        x = x + self.attn(self.ln_1(x), mask, attend)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """GPT-2 with random weights. `config` is a GPTConfig or a mapping with its fields."""

    def __init__(self, config: GPTConfig | Mapping):
        super().__init__()
        config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        self.config = config
        self.recompute = False  # True: the backward pass recomputes each block's activations
        wte = torch.empty(config.vocab_size, config.n_embd)
        wpe = torch.empty(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding.from_pretrained(wte, freeze=False),
            "wpe": nn.Embedding.from_pretrained(wpe, freeze=False),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        # skip the meta device, on which normal_() imports torch's compiler (about a second)
        if not self.transformer.wte.weight.is_meta:
            for p, values in self.initial_weights():
                p.data.copy_(values)

    def initial_weights(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yields each parameter with its initial values, drawn in order from torch's generator."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                yield p, torch.zeros(p.shape)
            elif p.dim() == 1:  # LayerNorm weights
                yield p, torch.ones(p.shape)
            else:
                # 2 * n_layer projections add to the residual stream: scale to keep its variance
                residual = name.endswith("c_proj.weight")
                scale = 1 / math.sqrt(2 * self.config.n_layer) if residual else 1.0
                yield p, torch.empty(p.shape).normal_(std=0.02 * scale)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, loss in nats)."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        # compute the loss in chunks of rows: all logits (B * T, V) would take too much memory
        return None, cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten())

    def hidden(self, idx, positions=None, mask=None, attend=None):
        """Final hidden states: idx (B, T) -> (B, T, C). Raises ValueError if T exceeds block_size.

        By default idx holds sequences that start at position 0, with causal attention. Otherwise:
        `positions` (B, T) gives each token's position;
        `mask` (B, 1, T, T) is True where a token (row) attends to another token (column);
        `attend(layer, q, k, v)`, each (B, nh, T, hs), computes attention, e.g. over a cache.
        """
        T = idx.size(1)
        if positions is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.block_size}.")
        # embed tokens and positions
        wte, wpe = self.transformer.wte, self.transformer.wpe
        pos_emb = wpe.weight[:T] if positions is None else wpe(positions)  # (T, C) or (B, T, C)
        x = F.dropout(wte(idx) + pos_emb, self.config.dropout, self.training)  # (B, T, C)
        # apply the blocks
        for layer, block in enumerate(self.transformer.h):
            if self.recompute and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, mask, attend and functools.partial(attend, layer))  # (B, T, C)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V). The head is the token embedding."""
        return F.linear(x, self.transformer.wte.weight)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward per token of a sequence of T tokens: 6·N + 12·L·H·Q·T.

        From the PaLM paper (arXiv 2204.02311), appendix B. H·Q is n_embd.
        """
        return 6 * self.num_parameters() + 12 * self.config.n_layer * self.config.n_embd * T
