"""The sampling engine: a model and its tokenizer in, text out as it is made.

    python generate.py -p "ROMEO:" -n 3 --seed 42            # without -p: interactive
    python generate.py -m log/shakespeare-char-cpu --temperature 0.8 --top-k 50

    engine = Engine(*load_model("bundled")[:2])
    for piece in engine.stream("ROMEO:", max_new_tokens=200, seed=42):
        print(piece, end="", flush=True)

A model reads at most `block_size` tokens. A longer prompt keeps its end; and when sampling has filled the context, the
engine keeps the last half of it and prefills that again. This is what going on past the context means, everywhere.
"""
import copy
import dataclasses
import math
import secrets
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import tyro

from checkpoint import describe, load_model
from ddp import pick_device, seed_of
from errors import UserError, one_sentence
from model import GPT, KVCache
from tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def sample(logits, uniform, temperature=1.0, top_k=None, top_p=1.0):
    """One token id for each row of logits (B, V), by inverting its distribution at `uniform` (B,) in [0, 1); (B,).

    Temperature first, then the top_k likeliest, then the fewest of those that hold top_p of the probability
    (Holtzman et al. 2019). Temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(uniform.device, torch.float64)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # however small the temperature, 0 is the largest
    ids = None
    if top_k or top_p < 1:
        k = min(top_k or logits.size(-1), logits.size(-1))
        logits, ids = logits.topk(k)  # (B, k), likeliest first
    probs = logits.softmax(-1)
    if top_p < 1:
        probs = probs.where(probs.cumsum(-1) - probs < top_p, 0)
    cdf = probs.cumsum(-1)
    choice = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp(max=cdf.size(-1) - 1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


class Engine:
    """Samples from a model and scores texts with it. `dtype` "auto" is bfloat16 on CUDA and float32 elsewhere."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: Dtype = "auto"):
        self.tokenizer, self.block_size = tokenizer, model.config.block_size
        parameter = next(model.parameters())
        self.device = parameter.device
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, dtype)
        self.model = model if parameter.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)

    def encode(self, prompt: str) -> tuple[list[int], list[str]]:
        """(the ids that the model is given for `prompt`, sentences on what of the prompt it could not be given).

        An empty prompt becomes `<|endoftext|>`, or a line break for a tokenizer without one.
        """
        notices = []
        prompt, unknown = self.tokenizer.replace_unknown(prompt)
        if unknown:
            notices.append(f"The model's alphabet lacks these characters, which became spaces or were left out: {unknown}")
        ids = self.tokenizer.encode(prompt)
        if len(ids) > self.block_size:
            notices.append(f"The prompt has {len(ids):,} tokens, the model reads {self.block_size:,}: only its end was used.")
            ids = ids[-self.block_size:]
        if not ids and self.tokenizer.eot is None:
            ids = self.tokenizer.encode(self.tokenizer.replace_unknown("\n")[0]) or [0]
        return ids or [self.tokenizer.eot], notices

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt that may be ids already; what `encode` has to say of a text goes out as a warning."""
        if not isinstance(prompt, str):
            return prompt
        ids, notices = self.encode(prompt)
        for notice in notices:
            warnings.warn(notice, stacklevel=3)
        return ids

    def stream(self, prompt: str | list[int], **sampling) -> Iterator[str]:
        """The continuation of a prompt (text, or ids from `encode`), piece by piece.

        One piece a token, empty while a character is unfinished. For the options see `tokens`.
        """
        decode = self.tokenizer.stream_decoder()
        for (token,) in self.tokens(self.prompt_ids(prompt), **sampling):
            yield decode([token])
        if rest := decode([], final=True):
            yield rest

    def generate(self, prompt: str | list[int], n: int = 1, **sampling) -> list[str]:
        """n finished continuations of one prompt, without it; they share its prefill and differ in their random draws."""
        samples = [[] for _ in range(n)]
        for step in self.tokens(self.prompt_ids(prompt), n=n, **sampling):
            for ids, token in zip(samples, step):
                if token is not None:
                    ids.append(token)
        return [self.tokenizer.decode(ids) for ids in samples]

    @torch.inference_mode()
    def tokens(self, ids: list[int], n: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
               top_k: int | None = None, top_p: float = 1.0, seed: int | None = None) -> Iterator[list[int | None]]:
        """Samples n continuations of the ids token by token: at each step their n new ids, None for one that has ended.

        Sample i draws from its own random stream, that of (seed, i); no seed is a random one. A sample ends at
        `<|endoftext|>`, which it does not contain, or after max_new_tokens. Raises UserError for values out of range.
        """
        check_sampling(n, max_new_tokens, temperature, top_k, top_p)
        if not ids:
            raise UserError("There is no token to continue: give at least one.")
        if max_new_tokens == 0:
            return
        seed = secrets.randbits(32) if seed is None else seed
        randoms = [torch.Generator().manual_seed(seed_of(seed, i)) for i in range(n)]
        ended = [False] * n
        window = torch.tensor([ids[-self.block_size:]], device=self.device)  # (1, t): what the model has been given
        x, cache = self.prefill(window, max_new_tokens)
        x, cache, window = x.repeat(n, 1), cache.repeat(n), window.repeat(n, 1)
        for left in range(max_new_tokens, 0, -1):
            logits = self.logits(x)  # (n, V)
            if not logits.isfinite().all():
                raise UserError("The model's predictions are not numbers: its weights are damaged, or its training diverged.")
            uniform = torch.tensor([torch.rand((), generator=g, dtype=torch.float64) for g in randoms])
            chosen = sample(logits, uniform, temperature, top_k, top_p).tolist()
            ended = [over or i == self.tokenizer.eot for over, i in zip(ended, chosen)]
            if all(ended):
                return
            yield [None if over else i for over, i in zip(ended, chosen)]
            if left == 1:
                return  # nobody needs the logits that follow
            token = torch.tensor(chosen, device=self.device)[:, None]  # (n, 1)
            window = torch.cat([window, token], dim=1)
            if cache.length < self.block_size:
                x = self.model.hidden(token, cache)[:, -1]
            else:
                window = window[:, -max(1, self.block_size // 2):]
                x, cache = self.prefill(window, left - 1)

    def prefill(self, window, new_tokens: int):
        """The last hidden state (B, n_embd) of window (B, t), and a cache of it with room for new_tokens more."""
        room = min(self.block_size, window.size(1) + new_tokens)
        cache = KVCache.empty(self.model.config, window.size(0), room, device=self.device, dtype=self.dtype)
        return self.model.hidden(window, cache)[:, -1], cache

    def logits(self, x):
        """float32 logits (…, tokenizer.vocab_size) of x (…, n_embd): padding ids are never sampled nor scored."""
        return self.model.logits(x)[..., :self.tokenizer.vocab_size].float()

    def score(self, text: str) -> list[float | None]:
        """The log-probability (nats) of each token of a text given those before it.

        The first is given `<|endoftext|>`; for a tokenizer without one it is None.
        """
        return [token["logprob"] for token in self.inspect(text, top=0)]

    @torch.inference_mode()
    def inspect(self, text: str, top: int = 10) -> list[dict]:
        """Token by token what the model made of a text: `id`, `text`, `logprob`, and `top`, its likeliest choices
        there as (text, logprob) pairs. A text past the context is read in windows that overlap by half."""
        before = [] if self.tokenizer.eot is None else [self.tokenizer.eot]
        ids, decode = before + self.tokenizer.encode(text), self.tokenizer.decode
        tokens = [{"id": i, "text": decode([i]), "logprob": None, "top": []} for i in ids]
        done = 1  # ids[done:] are still to be scored
        while done < len(ids):
            start = 0 if done < self.block_size else done - max(1, self.block_size // 2)
            stop = min(start + self.block_size + 1, len(ids))
            window = torch.tensor([ids[start:stop - 1]], device=self.device)  # (1, t)
            hidden = self.model.hidden(window)[0, done - 1 - start:]  # (stop - done, n_embd)
            for i, logprobs in zip(range(done, stop), self.logits(hidden).log_softmax(-1)):  # (V,) each
                best = logprobs.topk(min(top, len(logprobs)))
                tokens[i]["logprob"] = logprobs[ids[i]].item()
                tokens[i]["top"] = [(decode([j]), p) for j, p in zip(best.indices.tolist(), best.values.tolist())]
            done = stop
        return tokens[len(before):]


def check_sampling(n, max_new_tokens, temperature, top_k, top_p):
    """Raises UserError, naming the value, for one that sampling cannot mean anything with."""
    for ok, sentence in (
            (n >= 1, f"The number of samples is at least 1, not {n}."),
            (max_new_tokens >= 0, f"The number of new tokens cannot be negative, as {max_new_tokens} is."),
            (math.isfinite(temperature) and temperature >= 0, f"The temperature is 0 or above, not {temperature}."),
            (top_k is None or top_k >= 1, f"top-k is at least 1, not {top_k}."),
            (0 < top_p <= 1, f"top-p is above 0 and at most 1, not {top_p}.")):
        if not ok:
            raise UserError(sentence)


# ----------------------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class GenerateConfig:
    """Continues a prompt; without one, asks for prompts until the input ends."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt, a Hugging Face folder or Hub id; the newest run or `bundled` when not given."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """The text to continue; asked for when not given."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of samples."""
    max_new_tokens: int = 256
    """Length of each sample, in tokens."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this share of the probability."""
    seed: int | None = None
    """The same seed gives the same text; a random one, which is printed, when not given."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA and float32 elsewhere."""


def main(config: GenerateConfig):
    check_sampling(config.n, config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    sys.stdout.reconfigure(errors="replace")  # where the terminal cannot show a character
    model, tokenizer, info = load_model(config.model, pick_device(config.device))
    engine = Engine(model, tokenizer, config.dtype)
    print(f"{info['name']}: {describe(info)}; {engine.dtype} on {engine.device}", file=sys.stderr)
    if "train_config" in info:
        recipe = ", ".join(f"{name} {value!r:.60}" for name, value in info["train_config"].items())
        print(f"trained with {recipe!r:.2000}", file=sys.stderr)
    if config.prompt is not None:
        return complete(engine, config.prompt, config)
    while True:
        try:
            prompt = input("\n> ")
        except EOFError:
            print()
            return
        complete(engine, prompt, config)


def complete(engine: Engine, prompt: str, config: GenerateConfig):
    """Prints n continuations of the prompt, a single one while it is made."""
    seed = secrets.randbits(32) if config.seed is None else config.seed
    ids, notices = engine.encode(prompt)
    for notice in (f"seed {seed}", *notices):
        print(notice, file=sys.stderr)
    options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_k": config.top_k,
               "top_p": config.top_p, "seed": seed}
    if config.n == 1:
        print(prompt, end="", flush=True)
        for piece in engine.stream(ids, **options):
            print(piece, end="", flush=True)
        print()
    else:
        print("\n--------\n".join(prompt + text for text in engine.generate(ids, n=config.n, **options)))


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(GenerateConfig))
