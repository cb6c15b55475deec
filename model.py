"""GPT-2, exactly: learned positions, pre-norm LayerNorm, gelu(tanh), biases, a tied head.

    model = GPT(GPTConfig())                    # GPT-2 124M with random weights
    logits, _ = model(idx)                      # idx (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)               # mean cross-entropy in nats per token

Parameters carry the names of OpenAI's release and of Hugging Face (`transformer.h.0.attn.c_attn.weight` …), in
`nn.Linear`'s (out, in) layout. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
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
    """The sizes of a model. Raises UserError for sizes that no model can have."""
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257  # 50304, a multiple of 128, when training from scratch with GPT-2's tokenizer
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    activation: str = "gelu_new"  # the tanh approximation; "gelu" is the exact one, as in nanoGPT's checkpoints

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} is a whole number of at least 1, not {getattr(self, name)!r}.")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} does not divide into {self.n_head} heads.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is at least 0 and below 1, not {self.dropout!r}.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation is one of {', '.join(ACTIVATIONS)}, not {self.activation!r}.")


# GPT-2's four sizes, and the eight of the GPT-3 paper (arXiv 2005.14165, table 2.1). Two rows of that table contradict
# themselves: n_head * d_head is 3072 for XL's d_model of 2048, and 5120 for 13B's 5140. We follow d_model, which the
# stated totals need: XL has 16 heads of the table's size 128, and 13B 20 heads of 257, as 40 do not divide 5140.
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
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, attend=None):
        """x (B, T, C) -> (B, T, C). A mask (B, 1, T, T) says which place attends to which; without it each does to itself and
        what is before it. `attend`, a function of q, k and v (B, nh, T, hs) each, attends in place of this, as a cache does."""
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for y in self.c_attn(x).split(C, dim=2))
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                               dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, attend=None):
        x = x + self.attn(self.ln_1(x), mask, attend)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model of a `GPTConfig`, or of a mapping with its fields, with GPT-2's initial weights."""

    def __init__(self, config: GPTConfig | Mapping):
        super().__init__()
        self.config = config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False),
            "wpe": nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd)})
        self.recompute = False  # whether the backward pass computes each block's activations again, instead of keeping them
        if not self.transformer.wte.weight.is_meta:  # where to draw would take a second, to import torch's compiler
            for p, values in self.initial():
                p.data.copy_(values)

    def initial(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter with its first values, drawn one after another from torch's random stream."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                yield p, torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
            else:
                # 2 * n_layer residual projections add up in the stream: each is scaled to keep its variance.
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                yield p, torch.empty(p.shape).normal_(std=0.02 * scale)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, vocab_size), None), or with targets (B, T) -> (None, loss in nats per token)."""
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        return None, cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten())

    def hidden(self, idx, positions=None, mask=None, attend=None):
        """Final hidden states (B, T, n_embd) of idx (B, T).

        Tokens that are no plain sequence come with their positions (B, T), and with a mask (B, 1, T, T), True where one attends
        to another, or with `attend(layer, q, k, v)` in attention's place. Raises ValueError for more tokens than the context.
        """
        T = idx.size(1)
        if positions is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.block_size}.")
        gpt = self.transformer
        x = gpt.wte(idx) + (gpt.wpe.weight[:T] if positions is None else gpt.wpe(positions))
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(gpt.h):
            if self.recompute and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, mask, attend and functools.partial(attend, i))
        return gpt.ln_f(x)

    def logits(self, x):
        """(…, n_embd) -> (…, vocab_size): the head is the token embedding itself."""
        return F.linear(x, self.transformer.wte.weight)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward for a token of a sequence of T: 6·N + 12·L·H·Q·T (PaLM, arXiv 2204.02311, appendix B)."""
        return 6 * self.num_parameters() + 12 * self.config.n_layer * self.config.n_embd * T
