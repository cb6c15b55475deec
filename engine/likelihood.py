"""How likely a model finds what follows a context: many endings of one context at once, and whole texts.

A context and its endings are a prefix, and a prefix is one sequence of one forward pass: the context once, and behind it the
endings, each of which sees the context and itself alone. Logits are computed only where a token of an ending is predicted.
"""
import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import ddp
from common.errors import UserError
from engine.packed import pack_model
from model import GPT
from tokenizer import Tokenizer

LOGITS = 2**24  # so many at a time


class SharedPrefix(NamedTuple):
    """A context, and endings that each go on from it, in token ids."""
    context: list[int]
    endings: list[list[int]]
    numbers: list[int]  # of which ending of its item each of them is, or is a part of


def fit_to_context(context: list[int], endings: list[list[int]], tokenizer: Tokenizer, block_size: int) -> list[SharedPrefix]:
    """The prefixes of an item: one, where all of it fits the model. Else each ending has its own, whose context is cut off on the
    left as lm-evaluation-harness does; and an ending longer than the model's context is scored in windows that overlap by half.

    `<|endoftext|>` stands for an empty context; where the tokenizer has none, an ending's first token does, and is not scored.
    """
    if not context and tokenizer.eot is not None:
        context = [tokenizer.eot]
    if context and len(context) + max(map(len, endings)) - 1 <= block_size:
        return [SharedPrefix(context, endings, list(range(len(endings))))]
    prefixes = []
    for number, ending in enumerate(endings):
        whole, start = context + ending, len(context) or 1
        if len(ending) <= block_size:
            whole, start = whole[-block_size - 1:], max(1, min(len(whole), block_size + 1) - len(ending))
        prefixes += [prefix._replace(numbers=[number]) for prefix in windows(whole, start, block_size, max(1, block_size // 2))]
    return prefixes


def windows(ids: list[int], start: int, block_size: int, stride: int) -> Iterator[SharedPrefix]:
    """ids[start:], which the model scores `stride` tokens at a time, each given as many as it reads; first all that it can."""
    while start < len(ids):
        stop = min(max(start + stride, block_size + 1), len(ids))
        yield SharedPrefix(ids[max(0, stop - 1 - block_size):start], [ids[start:stop]], [0])
        start = stop


@torch.no_grad()
def log_likelihoods(model: GPT, vocab_size: int, items: list[list[SharedPrefix]], batch_tokens: int | None,
                    world: ddp.World = ddp.SINGLE_PROCESS) -> Iterator[tuple[int, list]]:
    """The sum of log-probabilities (nats, over the first vocab_size ids) of the tokens of each ending of each item.

    Yields (the item's number, the sums of its endings by their numbers), the longest items first. Raises UserError for a model
    whose predictions are not numbers. Of a sharded model every rank of the world takes part, each with items of its own.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = pack_model(model.eval())
    device = model.transformer.wte.weight.device
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 65_536)  # a CPU's cache, a GPU's cores
    sizes = [len(prefixes) * max((length(prefix) for prefix in prefixes), default=0) + 1 for prefixes in items]
    order = sorted(range(len(items)), key=lambda i: sizes[i])
    at_a_time, sharded = max(1, LOGITS // vocab_size), ddp.is_sharded(model)
    try:
        while ddp.any_rank(world, order) if sharded else order:
            if not order:  # the others cannot run theirs without this rank
                fast.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))
                continue
            count = max(1, batch_tokens // sizes[order[-1]])
            batch, order = order[-count:], order[:-count]
            prefixes = [prefix for i in batch for prefix in items[i]]
            ids, positions, mask, places, targets, lengths = (
                tensor.to(device) for tensor in pack([lay_out(prefix) for prefix in prefixes]))
            hidden = fast.hidden(ids, positions=positions, mask=mask).flatten(0, 1)  # (B * T, C)
            found = torch.cat([log_probabilities(fast.logits(hidden[some])[:, :vocab_size].float(), followed)
                               for some, followed in zip(places.split(at_a_time), targets.split(at_a_time))])
            if not found.isfinite().all():
                raise UserError("The model's predictions are not numbers: its weights are damaged, or its training diverged.")
            sums = iter([part.sum().item() for part in found.cpu().double().split(lengths.tolist())])  # prefix by prefix
            for i in batch:
                totals = [0.0] * (1 + max((number for prefix in items[i] for number in prefix.numbers), default=-1))
                for number in (number for prefix in items[i] for number in prefix.numbers):
                    totals[number] += next(sums)
                yield i, totals
    finally:
        for module, was_training in modes:
            module.training = was_training


def log_probabilities(logits, targets):
    """(N,) of targets (N,) under logits (N, V), which it overwrites: `torch.logsumexp` is several times slower on a CPU."""
    followed = logits.gather(1, targets[:, None])[:, 0]
    largest = logits.amax(-1, keepdim=True)
    return followed - logits.sub_(largest).exp_().sum(-1).log_().add_(largest[:, 0])


def length(prefix: SharedPrefix) -> int:
    """Tokens of the prefix's sequence: nobody asks what follows an ending's last token."""
    return len(prefix.context) + sum(max(0, len(ending) - 1) for ending in prefix.endings)


class Layout(NamedTuple):
    """A prefix as a sequence of T tokens, and where in it the S tokens of its endings are predicted."""
    ids: list[int]  # (T,)
    positions: list[int]  # (T,)
    branches: list[int]  # (T,) 0 in the context, else the number of the ending from 1
    places: list[int]  # (S,)
    targets: list[int]  # (S,) the tokens that follow there
    lengths: list[int]  # of the endings


def lay_out(prefix: SharedPrefix) -> Layout:
    context = prefix.context
    layout = Layout(list(context), list(range(len(context))), [0] * len(context), [], [], [])
    for branch, ending in enumerate(prefix.endings, 1):
        inputs = ending[:-1]
        if ending:
            layout.places.extend([len(context) - 1, *range(len(layout.ids), len(layout.ids) + len(inputs))])
        layout.ids.extend(inputs)
        layout.positions.extend(range(len(context), len(context) + len(inputs)))
        layout.branches.extend([branch] * len(inputs))
        layout.targets.extend(ending)
        layout.lengths.append(len(ending))
    return layout


def pack(layouts: list[Layout]) -> tuple[torch.Tensor, ...]:
    """ids, positions (B, T) and mask (B, 1, T, T) of a batch; places in it (B * T) and targets (S,); lengths of the endings."""
    T = max((len(layout.ids) for layout in layouts), default=0)
    padded = np.zeros((3, len(layouts), T), dtype=np.int64)
    for b, layout in enumerate(layouts):
        padded[:, b, :len(layout.ids)] = layout[:3]
    ids, positions, branches = torch.from_numpy(padded)
    mask = (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])  # (B, T, T): a token sees context and branch
    places = [b * T + place for b, layout in enumerate(layouts) for place in layout.places]
    targets, lengths = ([value for layout in layouts for value in getattr(layout, name)] for name in ("targets", "lengths"))
    return ids, positions, mask.tril()[:, None], *(torch.tensor(x, dtype=torch.long) for x in (places, targets, lengths))


def perplexity(model: GPT, tokenizer: Tokenizer, text: str, stride: int | None = None, batch_tokens: int | None = None,
               show_progress: bool = False) -> dict[str, float]:
    """{"nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "stride"} of a text.

    Each window of the model's context scores its last `stride` tokens (half the context when not given), given those before; the
    first window all it has. The text begins after `<|endoftext|>`; where the tokenizer has none, its first token is not scored.
    """
    model = getattr(model, "module", model)  # in DistributedDataParallel
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"The stride is at least 1 and at most the model's context of {block_size} tokens, not {stride}.")
    ids = [tokenizer.eot] * (tokenizer.eot is not None) + encode(tokenizer, text)
    if len(ids) < 2:
        raise UserError("The text has no token to score.")
    scored_bytes = len(text.encode(errors="replace")) - (len(tokenizer.decode_bytes(ids[:1])) if tokenizer.eot is None else 0)
    nats, tokens, all_windows = 0.0, 0, windows(ids, 1, block_size, stride)
    with tqdm(total=len(ids) - 1, desc="text", unit="token", unit_scale=True, disable=not show_progress) as bar:
        while some := [[window] for window in islice(all_windows, 1000)]:
            for i, (logprob,) in log_likelihoods(model, tokenizer.vocab_size, some, batch_tokens):
                nats -= logprob
                tokens += len(some[i][0].endings[0])
                bar.update(tokens - bar.n)
                bar.set_postfix_str(f"{nats / tokens:.4f} nats a token", refresh=False)
    return {"nats_per_token": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700)), "tokens": tokens,
            "bits_per_byte": nats / math.log(2) / scored_bytes, "bytes": scored_bytes, "stride": stride}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's ids, without a word on what the tokenizer cannot spell."""
    return tokenizer.encode(tokenizer.replace_unknown(text)[0])
