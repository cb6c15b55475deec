"""Log-likelihoods of continuations given a context, and the perplexity of texts.

One forward pass scores all continuations of a context. The context is the shared prefix of one
packed sequence, and the continuations are branches behind it (tree attention). Here the context is
c0 c1 c2, and the continuations are a0 a1 a2 and b0 b1:

    ids        c0 c1 c2 a0 a1 b0        the last token of a continuation is predicted, but not read
    positions   0  1  2  3  4  3        every continuation follows the context
    branches    0  0  0  1  1  2

The attention mask (row attends to column) hides the branches from each other:

        c0 c1 c2 a0 a1 b0
    c0   x                              c2 predicts a0 and b0
    c1   x  x
    c2   x  x  x
    a0   x  x  x  x                     a0 predicts a1
    a1   x  x  x  x  x                  a1 predicts a2
    b0   x  x  x        x               b0 predicts b1

Logits are computed only for the rows that predict a token of a continuation.
"""
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import ddp
from common.errors import UserError
from engine.cache import common_prefix
from engine.packed import pack_model
from model import GPT
from tokenizer import Tokenizer

MAX_LOGITS = 2**24  # logits in memory at a time


# --------------------------------------------------------------------------------------------------
# Contexts and continuations that fit the model

class SharedPrefix(NamedTuple):
    """A context and several continuations of it, in token ids."""
    context: list[int]
    continuations: list[list[int]]
    indices: list[int]  # each continuation's index in its item; windows of one share its index
    unscored: list[int] | None = None  # leading tokens of each continuation to leave out of its sum


def fit_to_context(context: list[int], continuations: list[list[int]], tokenizer: Tokenizer,
                   block_size: int) -> list[SharedPrefix]:
    """Splits an item, a context with its continuations, into parts that fit the model's context.

    If the item fits, it is one part. Otherwise each continuation gets a part of its own, with the
    context truncated from the left, as in lm-evaluation-harness. A continuation that is longer than
    the model's context is scored in windows that overlap by half.

    `<|endoftext|>` stands in for an empty context. If the tokenizer has none, the continuation's
    first token does, and is not scored.
    """
    if not context and tokenizer.eot is not None:
        context = [tokenizer.eot]
    if context and len(context) + max(map(len, continuations)) - 1 <= block_size:
        return [SharedPrefix(context, continuations, list(range(len(continuations))))]
    parts = []
    for index, continuation in enumerate(continuations):
        ids = context + continuation
        start = len(context) or 1
        if len(continuation) <= block_size:
            # truncate the context from the left
            ids = ids[-block_size - 1:]
            start = max(1, len(ids) - len(continuation))
        for window in rolling_windows(ids, start, block_size, stride=max(1, block_size // 2)):
            parts.append(window._replace(indices=[index]))
    return parts


def rolling_windows(ids: list[int], start: int, block_size: int,
                    stride: int) -> Iterator[SharedPrefix]:
    """Windows that score ids[start:] once, each with as much context as the model can read.

    The first window scores all tokens that fit, each of the others scores the next `stride` tokens.
    """
    while start < len(ids):
        stop = min(max(start + stride, block_size + 1), len(ids))
        context = ids[max(0, stop - 1 - block_size):start]
        yield SharedPrefix(context, [ids[start:stop]], [0])
        start = stop


# --------------------------------------------------------------------------------------------------
# Requests that share a prefix

def group_by_prefix(pairs: list[tuple[list[int], list[int]]], max_tokens: int
                    ) -> list[SharedPrefix]:
    """Group (context, continuation) pairs so that the tokens that they share are computed once.

    Pairs share a context, as the answers to a question do, or only its beginning, as questions
    after the same examples do. The `indices` of a group are into `pairs`. A group of at most
    `max_tokens` takes a pair if that saves a quarter of the pair's tokens or more.
    """
    sequences = [context + continuation for context, continuation in pairs]
    groups = []  # (indices of the members, number of tokens that they share)
    for i in sorted(range(len(pairs)), key=lambda i: sequences[i]):
        length = len(pairs[i][0])  # a group can share what precedes the first scored token
        if groups:
            members, shared = groups[-1]
            common = min(shared, length, common_prefix(sequences[members[-1]], sequences[i]))
            saved = common * len(members) - shared * (len(members) - 1)
            tokens = common + sum(len(sequences[j]) - common for j in [*members, i])
            if saved > len(sequences[i]) // 4 and tokens <= max_tokens:
                groups[-1] = ([*members, i], common)
                continue
        groups.append(([i], length))
    return [SharedPrefix(sequences[members[0]][:shared], [sequences[i][shared:] for i in members],
                         members, [len(pairs[i][0]) - shared for i in members])
            for members, shared in groups]


# --------------------------------------------------------------------------------------------------
# Log-likelihoods

class Likelihood(NamedTuple):
    """The log-likelihood of a continuation, over the first `vocab_size` ids."""
    logprob: float  # the sum of the tokens' log-probabilities, in nats
    is_greedy: bool  # whether each token is the likeliest one after those before it


@torch.no_grad()
def log_likelihoods(model: GPT, vocab_size: int, items: list[list[SharedPrefix]],
                    batch_tokens: int | None, world: ddp.World = ddp.SINGLE_PROCESS,
                    ) -> Iterator[tuple[int, list[Likelihood]]]:
    """Yields (the item's index, a `Likelihood` for each of its continuations), longest first.

    Raises UserError if the model predicts NaN, and ddp.Stopped after a signal to a training run.
    All ranks of the world must call this together, each with its own items.
    """
    was_training = [(module, module.training) for module in model.modules()]
    packed = pack_model(model.eval())
    device = model.transformer.wte.weight.device
    if not batch_tokens:
        batch_tokens = 1024 if device.type == "cpu" else 65_536  # fits a CPU's cache; fills a GPU
    # sort the items by the tokens of their padded sequences
    sizes = []
    for parts in items:
        longest = max((packed_length(part) for part in parts), default=0)
        sizes.append(len(parts) * longest + 1)
    remaining = sorted(range(len(items)), key=lambda i: sizes[i])
    sharded = ddp.is_sharded(model)
    try:
        while ddp.any_rank(world, remaining):
            ddp.check_signals(world)
            if not remaining:
                # wait for the ranks that still have items, and run a sharded model along with them
                if sharded:
                    packed.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))
                continue
            # score a batch of the longest items
            count = max(1, batch_tokens // sizes[remaining[-1]])
            batch, remaining = remaining[-count:], remaining[:-count]
            parts = [part for i in batch for part in items[i]]
            scores = iter(score_batch(packed, vocab_size, parts))
            # add up the windows of each continuation
            for i in batch:
                indices = [index for part in items[i] for index in part.indices]
                totals = [Likelihood(0.0, True)] * (max(indices, default=-1) + 1)
                for index in indices:
                    logprob, is_greedy = next(scores)
                    total = totals[index]
                    totals[index] = Likelihood(total.logprob + logprob,
                                               total.is_greedy and is_greedy)
                yield i, totals
    finally:
        for module, training in was_training:
            module.training = training


def score_batch(model: GPT, vocab_size: int, parts: list[SharedPrefix]) -> list[Likelihood]:
    """The likelihood of each continuation of the parts, in order, in one forward pass."""
    device = model.transformer.wte.weight.device
    *inputs, lengths = pack(parts)
    ids, positions, mask, logit_rows, targets = (tensor.to(device) for tensor in inputs)
    hidden = model.hidden(ids, positions=positions, mask=mask).flatten(0, 1)  # (B * T, C)
    # compute the logits in chunks of rows
    chunk = max(1, MAX_LOGITS // vocab_size)
    scores = []
    for rows, row_targets in zip(logit_rows.split(chunk), targets.split(chunk)):
        logits = model.logits(hidden[rows])[:, :vocab_size].float()  # (rows, V)
        scores.append(score_targets(logits, row_targets))
    logprobs, is_greedy = (torch.cat(chunks).cpu() for chunks in zip(*scores))  # (S,) each
    if not logprobs.isfinite().all():
        raise UserError("The model predicts NaN: its weights are damaged or its training diverged.")
    return [Likelihood(tokens.sum().item(), greedy.all().item()) for tokens, greedy in
            zip(logprobs.double().split(lengths), is_greedy.split(lengths))]


def score_targets(logits, targets):
    """log_softmax(logits)[targets] and whether each target is the likeliest id, both (N,).

    Takes logits (N, V), which it overwrites, and targets (N,). The softmax is written out because
    `torch.logsumexp` is several times slower on a CPU.
    """
    target_logits = logits.gather(1, targets[:, None])[:, 0]  # (N,)
    largest = logits.amax(-1)  # (N,)
    log_sum = logits.sub_(largest[:, None]).exp_().sum(-1).log_().add_(largest)
    return target_logits - log_sum, target_logits == largest


# --------------------------------------------------------------------------------------------------
# Packing, as drawn at the top

def packed_length(part: SharedPrefix) -> int:
    """Number of tokens in the packed sequence; the last of each continuation is only predicted."""
    inputs = [max(0, len(continuation) - 1) for continuation in part.continuations]
    return len(part.context) + sum(inputs)


def pack(parts: list[SharedPrefix]) -> tuple:
    """Pack each part into a sequence: the context once, then each continuation as a branch.

    Returns, for B sequences padded to T tokens with S tokens to score in all continuations: ids and
    positions (B, T), the mask (B, 1, T, T), logit_rows (S,), which predict the targets and index
    the flattened (B * T), targets (S,), and the number of scored tokens of each continuation.
    """
    T = max(map(packed_length, parts), default=0)
    padded = np.zeros((3, len(parts), T), dtype=np.int64)
    logit_rows, targets, lengths = [], [], []
    for b, part in enumerate(parts):
        P = len(part.context)
        ids, positions, branches = list(part.context), list(range(P)), [0] * P
        unscored = part.unscored or [0] * len(part.continuations)
        for branch, (continuation, skip) in enumerate(zip(part.continuations, unscored), 1):
            inputs = continuation[:-1]
            # the context's last token predicts the first token, each input the one after it
            rows = [P - 1, *range(len(ids), len(ids) + len(inputs))]
            logit_rows += [b * T + row for row in rows[skip:len(continuation)]]
            ids += inputs
            positions += range(P, P + len(inputs))
            branches += [branch] * len(inputs)
            targets += continuation[skip:]
            lengths.append(len(continuation) - skip)
        padded[:, b, :len(ids)] = ids, positions, branches
    ids, positions, branches = torch.from_numpy(padded)  # (B, T) each
    # a token attends to the context and to its own branch, up to itself
    to_context = branches[:, None, :] == 0  # (B, 1, T)
    to_own_branch = branches[:, :, None] == branches[:, None, :]  # (B, T, T)
    mask = (to_context | to_own_branch).tril()[:, None]  # (B, 1, T, T)
    logit_rows = torch.tensor(logit_rows, dtype=torch.long)
    targets = torch.tensor(targets, dtype=torch.long)
    return ids, positions, mask, logit_rows, targets, lengths


# --------------------------------------------------------------------------------------------------
# Texts

def perplexity(model: GPT, tokenizer: Tokenizer, text: str, stride: int | None = None,
               batch_tokens: int | None = None, show_progress: bool = False) -> dict[str, float]:
    """{"nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "stride"} of a text.

    The text is read in windows of the model's context. The first window scores all its tokens, each
    of the others scores its last `stride` tokens (default: half the context). The text follows
    `<|endoftext|>`; if the tokenizer has none, the first token is not scored.
    """
    model = getattr(model, "module", model)  # unwrap DistributedDataParallel
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"The stride must be at least 1 and at most {block_size}, the model's "
                        f"context in tokens, not {stride}.")
    ids = encode(tokenizer, text)
    text_bytes = len(text.encode(errors="replace"))
    if tokenizer.eot is not None:
        ids = [tokenizer.eot, *ids]
    else:
        text_bytes -= len(tokenizer.decode_bytes(ids[:1]))  # the first token is not scored
    if len(ids) < 2:
        raise UserError("The text is too short: it contains no token to score.")
    # score 1,000 windows at a time
    nats, tokens = 0.0, 0
    windows = rolling_windows(ids, 1, block_size, stride)
    with tqdm(total=len(ids) - 1, desc="text", unit="token", unit_scale=True,
              disable=not show_progress) as bar:
        while items := [[window] for window in itertools.islice(windows, 1000)]:
            for i, (score,) in log_likelihoods(model, tokenizer.vocab_size, items, batch_tokens):
                nats -= score.logprob
                tokens += len(items[i][0].continuations[0])
                bar.update(tokens - bar.n)
                bar.set_postfix_str(f"{nats / tokens:.4f} nats per token", refresh=False)
    loss = nats / tokens
    return {"nats_per_token": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens,
            "bits_per_byte": nats / math.log(2) / text_bytes, "bytes": text_bytes, "stride": stride}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's token ids. Characters that the tokenizer lacks are replaced without a notice."""
    return tokenizer.encode(tokenizer.replace_unknown(text)[0])
