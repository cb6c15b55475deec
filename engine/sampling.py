"""How a token is chosen from a model's logits: the settings of a text, what each does to the logits, and the draw.

Logits are numpy's (V,) in float32: a token takes some twenty small steps here, each of which is a fifth of its price in torch.
"""
import dataclasses
import math

import numpy as np

from common.errors import UserError

SUM_BLOCK = 64  # probabilities are added up in blocks of so many, and the draw looks into one of them
NUCLEUS = 512  # likeliest tokens among which top_p is looked for first: to sort them all takes longer than the model does
TINY = 1e-30  # a temperature that is as good as none, and that float32 can divide by


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


def penalize(logits, seen: set[int], penalty: float):
    """Logits (V,) with those of the tokens `seen` made less likely (Keskar et al. 2019, section 4.1)."""
    logits, ids = logits.copy(), list(seen)
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def top_ids(logits, k: int):
    """The ids (k,) of the k largest of logits (V,), largest first."""
    largest = logits[:len(logits) // SUM_BLOCK * SUM_BLOCK].reshape(SUM_BLOCK, -1).max(0)  # of each SUM_BLOCK numbers: k of them are as large as
    bound = np.partition(largest if k <= len(largest) else logits, -k)[-k] if k else np.inf  # the k-th largest of these
    ids = np.flatnonzero(logits >= bound)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def weigh(logits, temperature: float, top_k: int | None = None, top_p: float = 1.0):
    """(weights in proportion to which a token is drawn, the ids that they are of or None for all in order) of logits (V,).

    Temperature first, then the top_k likeliest, then the fewest of those that hold top_p of the probability.
    """
    def exp(x):
        return np.exp((x - most) / np.float32(max(temperature, TINY)))  # however small the temperature, the largest is 1

    k = min(top_k or len(logits), len(logits))
    if k == len(logits) and top_p == 1:
        most = logits.max()
        return exp(logits), None
    ids = top_ids(logits, k if top_k else min(k, NUCLEUS))
    most = logits[ids[0]]
    weights = exp(logits[ids])
    if top_p < 1:
        total = (weights if top_k else exp(logits)).sum(dtype=np.float64)
        if len(ids) < k and weights.sum(dtype=np.float64) < top_p * total:
            ids = top_ids(logits, k)
            weights = exp(logits[ids])
        before = np.cumsum(weights, dtype=np.float64) - weights
        weights = weights[before < top_p * total]
    return weights, ids[:len(weights)]


def sample(logits, uniform: float, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> int:
    """A token id from logits (V,), by inverting its distribution at `uniform` in [0, 1). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    weights, ids = weigh(logits, temperature, top_k, top_p)
    blocks = np.append(weights, np.zeros(-len(weights) % SUM_BLOCK, weights.dtype)).reshape(-1, SUM_BLOCK)
    sums = blocks.sum(1, dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    block = min(int(sums.searchsorted(target, side="right")), len(sums) - 1)
    within = blocks[block].cumsum(dtype=np.float64)
    place = int(within.searchsorted(target - (sums[block - 1] if block else 0), side="right"))
    last = int(blocks[block].nonzero()[0][-1])  # rounding never draws what cannot be drawn
    choice = block * SUM_BLOCK + min(place, last)
    return choice if ids is None else int(ids[choice])
