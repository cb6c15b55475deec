"""How a token is chosen from a model's logits: the settings of a text, what each does to the logits, and the draw."""
import dataclasses
import math

import torch

from errors import UserError

BLOCK = 64  # probabilities are added up in blocks of so many, and the draw looks into one of them
NUCLEUS = 512  # likeliest tokens among which top_p is looked for first: to sort them all takes longer than the model does


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a text is written. Raises UserError, naming the value, for one that sampling cannot mean anything with."""
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int | None = None  # among the k likeliest
    top_p: float = 1.0  # among the fewest that hold this share of the probability (Holtzman et al. 2019)
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less likely
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    seed: int | None = None  # a random one when not given
    logprobs: int | None = None  # also the log-probability of each token, and of so many likeliest ones

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        for ok, sentence in (
                (self.max_new_tokens >= 0, f"The number of new tokens cannot be negative, as {self.max_new_tokens} is."),
                (math.isfinite(self.temperature) and self.temperature >= 0,
                 f"The temperature is 0 or above, not {self.temperature}."),
                (self.top_k is None or self.top_k >= 1, f"top-k is at least 1, not {self.top_k}."),
                (0 < self.top_p <= 1, f"top-p is above 0 and at most 1, not {self.top_p}."),
                (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                 f"The repetition penalty is above 0, not {self.repetition_penalty}."),
                (self.logprobs is None or self.logprobs >= 0, f"logprobs is 0 or more, not {self.logprobs}."),
                (all(self.stop), "A stop string cannot be empty.")):
            if not ok:
                raise UserError(sentence)


def penalize(logits, seen, penalty: float):
    """Logits (V,) with those of the tokens `seen` (N,), each named once, made less likely (Keskar et al. 2019, section 4.1)."""
    there = logits[seen]
    return logits.index_copy(0, seen, torch.where(there > 0, there / penalty, there * penalty))


def weigh(logits, temperature: float, top_k: int | None = None, top_p: float = 1.0):
    """(weights in proportion to which a token is drawn, the ids that they are of or None for all in order) of logits (V,).

    Temperature first, then the top_k likeliest, then the fewest of those that hold top_p of the probability.
    """
    weights = (logits - logits.max()).div_(temperature).exp_()  # however small the temperature, the largest is 1
    if not top_k and top_p == 1:
        return weights, None
    k = min(top_k or len(weights), len(weights))
    total = None if top_k else weights.sum(dtype=torch.float64)
    kept, ids = weights.topk(k if top_k else min(k, NUCLEUS))  # likeliest first
    if top_p < 1:
        total = kept.sum(dtype=torch.float64) if top_k else total
        before = kept.cumsum(0, dtype=torch.float64).sub_(kept)
        if len(kept) < k and before[-1] < top_p * total:
            kept, ids = weights.sort(descending=True)
            before = kept.cumsum(0, dtype=torch.float64).sub_(kept)
        kept = kept[before < top_p * total]
    return kept, ids


def sample(logits, uniform: float, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> int:
    """A token id from logits (V,) in float32, by inverting its distribution at `uniform` in [0, 1). Temperature 0 takes the
    likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    weights, ids = weigh(logits, temperature, top_k, top_p)
    blocks = torch.nn.functional.pad(weights, (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    sums = blocks.sum(1, dtype=torch.float64).cumsum(0)
    target = uniform * sums[-1]
    block = min(int(torch.searchsorted(sums, target, right=True)), len(sums) - 1)
    within = blocks[block].cumsum(0, dtype=torch.float64)
    place = int(torch.searchsorted(within, target - (sums[block - 1] if block else 0), right=True))
    last = int(blocks[block].nonzero()[-1]) if blocks[block].any() else 0  # rounding never draws what cannot be drawn
    choice = block * BLOCK + min(place, last)
    return choice if ids is None else int(ids[choice])
