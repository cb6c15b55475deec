"""Samples a token from a model's logits: the settings, the filtered distribution, and the draw.

Logits are NumPy arrays of shape (V,) in float32. Sampling one token takes about twenty small array
operations, and each of them is about five times faster in NumPy than in torch.
"""
import dataclasses
import math

import numpy as np

from common.errors import UserError

BLOCK = 64  # the draw and the top-k search look at blocks of this many numbers first
TOP_P_IDS = 512  # top-p first looks at this many likeliest tokens; sorting the vocabulary is slow
MAX_STOPS = 8  # 4, as OpenAI's API takes, and those that end a turn
MAX_STOP_CHARS = 100  # in one stop string
MIN_TEMPERATURE = 1e-30  # close enough to greedy, and float32 can still divide by it
MAX_PENALTY = 1e30  # likewise for a penalty, which is at least the inverse of this


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings for one request. Raises UserError if a value is out of range."""
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 always takes the likeliest token
    top_k: int | None = None  # sample from the k likeliest tokens only
    top_p: float = 1.0  # nucleus sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)
    repetition_penalty: float = 1.0  # above 1, tokens that have occurred become less likely
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    seed: int | None = None  # None picks a random seed
    logprobs: int | None = None  # report each token's log-probability and that of this many top ids

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        rules = {  # setting -> (what it must be, whether it is)
            "max_new_tokens": ("0 or more", self.max_new_tokens >= 0),
            "temperature": ("0 or more", 0 <= self.temperature < math.inf),
            "top_k": ("at least 1", self.top_k is None or self.top_k >= 1),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": ("above 0", 0 < self.repetition_penalty < math.inf),
            "logprobs": ("0 or more", self.logprobs is None or self.logprobs >= 0),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise UserError(f"{name} must be {rule}, not {getattr(self, name)}.")
        if len(self.stop) > MAX_STOPS or not all(0 < len(s) <= MAX_STOP_CHARS for s in self.stop):
            raise UserError(f"Give at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARS} "
                            "characters.")


def penalize(logits, seen: set[int], penalty: float):
    """A copy of logits (V,) in which the tokens in `seen` are less likely.

    The repetition penalty of CTRL (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, 4.1).
    """
    penalty = min(max(penalty, 1 / MAX_PENALTY), MAX_PENALTY)
    logits = logits.copy()
    ids = list(seen)
    seen_logits = logits[ids]
    logits[ids] = np.where(seen_logits > 0, seen_logits / penalty, seen_logits * penalty)
    return logits


def top_ids(logits, k: int):
    """The ids (k,) of the k largest logits (V,), largest first."""
    if k == 0:
        return np.empty(0, dtype=np.int64)
    # The k-th largest block maximum is a lower bound for the k-th largest logit.
    whole_blocks = logits[:len(logits) // BLOCK * BLOCK]
    block_maxima = whole_blocks.reshape(BLOCK, -1).max(0)  # (V // BLOCK,)
    values = block_maxima if k <= len(block_maxima) else logits
    bound = np.partition(values, -k)[-k]
    # sort only the few logits that reach the bound
    ids = np.flatnonzero(logits >= bound)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def weigh(logits, temperature: float, top_k: int | None = None, top_p: float = 1.0):
    """Applies temperature, then top-k, then top-p to logits (V,).

    Returns (weights, ids): unnormalized probabilities and the ids they belong to. `ids` is None if
    no token is filtered out; the weights are then those of the whole vocabulary, in order.
    """
    divisor = np.float32(max(temperature, MIN_TEMPERATURE))
    k = min(top_k or len(logits), len(logits))
    if k == len(logits) and top_p == 1:
        return np.exp((logits - logits.max()) / divisor), None

    # without top-k, rank only the likeliest tokens: they usually hold top_p of the probability
    ids = top_ids(logits, k if top_k else min(k, TOP_P_IDS))
    largest = logits[ids[0]]
    weights = np.exp((logits[ids] - largest) / divisor)
    if top_p < 1:
        all_weights = weights if top_k else np.exp((logits - largest) / divisor)
        total = all_weights.sum(dtype=np.float64)
        if len(ids) < k and weights.sum(dtype=np.float64) < top_p * total:
            ids = top_ids(logits, k)
            weights = np.exp((logits[ids] - largest) / divisor)
        # keep a token if the tokens before it hold less than top_p
        mass_before = np.cumsum(weights, dtype=np.float64) - weights
        weights = weights[mass_before < top_p * total]
    return weights, ids[:len(weights)]


def sample(logits, uniform: float, temperature: float = 1.0, top_k: int | None = None,
           top_p: float = 1.0) -> int:
    """Draws a token id from logits (V,).

    Inverts the cumulative distribution at `uniform`, a number in [0, 1). Temperature 0 is greedy.
    """
    if temperature == 0:
        return int(logits.argmax())
    weights, ids = weigh(logits, temperature, top_k, top_p)

    # find the block in which the cumulative sum passes the target
    padding = np.zeros(-len(weights) % BLOCK, weights.dtype)
    blocks = np.append(weights, padding).reshape(-1, BLOCK)
    block_ends = blocks.sum(1, dtype=np.float64).cumsum()
    target = uniform * block_ends[-1]
    block = min(int(block_ends.searchsorted(target, side="right")), len(block_ends) - 1)

    # find the token within the block
    block_start = block_ends[block - 1] if block else 0
    token_ends = blocks[block].cumsum(dtype=np.float64)
    offset = int(token_ends.searchsorted(target - block_start, side="right"))
    last = int(blocks[block].nonzero()[0][-1])  # rounding must not select a token of weight 0
    choice = block * BLOCK + min(offset, last)
    return choice if ids is None else int(ids[choice])
