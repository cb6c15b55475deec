"""The sampling engine: a model and its tokenizer in, text out as it is made.

    python generate.py -p "The history of" -n 3 --seed 42    # without -p: interactive
    python generate.py -m log/shakespeare-char-cpu --temperature 0.8 --top-k 50
    python generate.py --file beginning.txt --stop "\n\n" --json

    engine = Engine(*load_model("bundled")[:2])
    for piece in engine.stream("The history of", max_new_tokens=200, seed=42):
        print(piece, end="", flush=True)

Any number of threads may ask at once: scheduler.py steps all texts together, sampling.py chooses their tokens.

A model reads at most `block_size` tokens. A longer prompt keeps its end; and when sampling has filled the context, the
engine keeps the last half of it and prefills that again. This is what going on past the context means, everywhere.
"""
import copy
import dataclasses
import functools
import json
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from checkpoint import describe, load_model
from common.errors import UserError, report_user_errors
from ddp import pick_device
from engine import native
from engine.forward import CHUNK, Forward, Segment
from engine.packed import supports_dtype, use_allowed_cores
from engine.sampling import Sampling
from engine.scheduler import Request, Scheduler, Token
from model import GPT
from tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
LARGE = 20_000_000  # parameters: weights of more do not stay in a CPU's cache, and reading them is what a token costs


class Piece(NamedTuple):
    """What one token adds to the text of sample `index`: nothing, while a character or a stop string may be unfinished.

    The last of a text has a reason, "stop", "length" or "deadline", and may have no token but what was held back.
    """
    index: int
    text: str
    token: Token | None = None
    reason: str | None = None


class Reader:
    """Makes text of a request's events, and ends each text before its first stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.request, self.decoders = request, [tokenizer.stream_decoder() for _ in range(request.n)]
        self.held = [""] * request.n  # text that may be the beginning of a stop string
        self.over = set()

    def read(self, event: tuple[int, Token | str]) -> list[Piece]:
        """What an event adds: one piece, or none where the text is over."""
        i, token = event
        if i in self.over:
            return []
        reason = token if isinstance(token, str) else None
        text = self.held[i] + (self.decoders[i]([], final=True) if reason else self.decoders[i]([token.id]))
        stop = self.request.sampling.stop
        found = min((place for place in map(text.find, stop) if place >= 0), default=None)
        if found is not None:
            text, reason = text[:found], "stop"
            self.request.cancel(i)
        held = 0 if reason else max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held[i] = text[len(text) - held:]
        if reason:
            self.over.add(i)
        return [Piece(i, text[:len(text) - held], None if isinstance(token, str) else token, reason)]


class Engine:
    """Samples from a model and scores texts with it. `dtype` "auto" is bfloat16 on CUDA; on a CPU int8 for models of 20 million
    parameters or more, which are as fast as their bytes are read, and float32 for smaller ones. `limits` are the scheduler's:
    how many texts run at once, how many requests wait, and for how long. Without `native` torch computes all."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: Dtype = "auto", native: bool = True, **limits):
        self.tokenizer, self.block_size, self.limits, self.native = tokenizer, model.config.block_size, limits, native
        self.device = next(model.parameters()).device
        if dtype == "auto":
            large = model.num_parameters() >= LARGE and supports_dtype("int8", self.device)
            dtype = "bfloat16" if self.device.type == "cuda" else "int8" if large else "float32"
        if not supports_dtype(dtype, self.device):
            raise UserError(f"{dtype} needs an x86 CPU, and this is {self.device}: choose another --dtype.")
        self.dtype = dtype
        weights = torch.float32 if self.device.type == "cpu" else getattr(torch, dtype)
        same = all(p.dtype == weights for p in model.parameters())
        self.model = model if same else copy.deepcopy(model).to(weights)

    @functools.cached_property
    def forward(self) -> Forward:
        """The model's steps, made when they are first needed, as packing the weights takes a while."""
        return native.forward(self.model, self.dtype) if self.native else Forward(self.model, self.dtype)

    @property
    def packed(self) -> GPT:
        """The model as torch runs it: on a CPU with its matrices in the engine's precision."""
        return self.forward.model

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        return Scheduler(self.forward, self.tokenizer.vocab_size, self.tokenizer.eot, self.block_size, **self.limits)

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

    def submit(self, prompt: str | list[int], n: int = 1, **sampling) -> Request:
        """Asks the scheduler for n continuations of a prompt (text, or ids from `encode`): their tokens as they are sampled.

        Sample i draws from its own random stream, that of (seed, i), and ends at `<|endoftext|>`, which it does not contain, or
        after max_new_tokens. The options are those of `Sampling`; raises UserError for values out of range, and Busy.
        """
        return self.scheduler.submit(self.prompt_ids(prompt), n, Sampling(**sampling))

    def pieces(self, request: Request) -> Iterator[Piece]:
        """The texts of a request, piece by piece, as a `Reader` reads them."""
        reader = Reader(self.tokenizer, request)
        for event in request:
            yield from reader.read(event)

    def stream(self, prompt: str | list[int], **sampling) -> Iterator[str]:
        """The continuation of a prompt (text, or ids from `encode`), piece by piece: one a token, and what was held back at the
        end. For the options see `Sampling`."""
        for piece in self.pieces(self.submit(prompt, **sampling)):
            if piece.token or piece.text:
                yield piece.text

    def generate(self, prompt: str | list[int], n: int = 1, **sampling) -> list[str]:
        """n finished continuations of one prompt, without it; they share its prefill and differ in their random draws."""
        texts = [""] * n
        for piece in self.pieces(self.submit(prompt, n, **sampling)):
            texts[piece.index] += piece.text
        return texts

    def score(self, text: str) -> list[float | None]:
        """The log-probability (nats) of each token of a text given those before it.

        The first is given `<|endoftext|>`; for a tokenizer without one it is None.
        """
        return [token["logprob"] for token in self.inspect(text, top=0)]

    def inspect(self, text: str | list[int], top: int = 10) -> list[dict]:
        """Token by token what the model made of a text, or of ids: `id`, `text`, `logprob`, and `top`, its likeliest choices
        there as (text, logprob) pairs. A text follows `<|endoftext|>` where there is one, ids nothing: the first of them has no
        log-probability. What is past the context is read in windows that overlap by half."""
        before = [self.tokenizer.eot] if isinstance(text, str) and self.tokenizer.eot is not None else []
        ids, decode = before + (self.tokenizer.encode(text) if isinstance(text, str) else text), self.tokenizer.decode
        tokens = [{"id": i, "text": decode([i]), "logprob": None, "top": []} for i in ids]
        done = 1  # ids[done:] are still to be scored
        while done < len(ids):
            start = 0 if done < self.block_size else done - max(1, self.block_size // 2)
            stop = min(start + self.block_size + 1, len(ids))
            cache = self.forward.new_cache()
            for place in range(start, stop - 1, CHUNK):  # logits of a whole window would be large
                chunk = ids[place:min(place + CHUNK, stop - 1)]
                new = range(max(done - 1 - place, 0), len(chunk))  # those that no window before has scored
                logits = self.forward([Segment(cache, place - start, chunk)], new)[:, :self.tokenizer.vocab_size]
                for i, logprobs in zip((place + row + 1 for row in new), logits.log_softmax(-1)):  # (V,) each
                    best = logprobs.topk(min(top, len(logprobs)))
                    tokens[i]["logprob"] = logprobs[ids[i]].item()
                    tokens[i]["top"] = [(decode([j]), p) for j, p in zip(best.indices.tolist(), best.values.tolist())]
            done = stop
        return tokens[len(before):]


# ----------------------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class GenerateConfig:
    """Continues a prompt; without one, asks for prompts until the input ends."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt, a Hugging Face folder or Hub id; the newest run or `bundled` when not given."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """The text to continue; asked for when not given."""
    file: Path | None = None
    """A file with the text to continue; - is the standard input."""
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
    repetition_penalty: float = 1.0
    """Above 1: tokens that are there already become less likely."""
    stop: tuple[str, ...] = ()
    """Strings before the first of which a sample ends; \\n is a line break."""
    seed: int | None = None
    """The same seed gives the same text; a random one, which is printed, when not given."""
    json: bool = False
    """Print a JSON object for each sample instead of text."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA; on a CPU int8 for models of 20 million parameters or more, and float32 for smaller ones."""


def main(config: GenerateConfig):
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling) if hasattr(config, field.name)}
    options["stop"] = tuple(stop.replace("\\n", "\n") for stop in config.stop)
    Sampling(**options)  # says what is wrong before a model is loaded
    sys.stdout.reconfigure(errors="replace")  # where the terminal cannot show a character
    prompt = config.prompt
    if config.file is not None:
        prompt = sys.stdin.read() if str(config.file) == "-" else config.file.read_text(encoding="utf-8", errors="replace")
    use_allowed_cores()
    model, tokenizer, info = load_model(config.model, pick_device(config.device))
    engine = Engine(model, tokenizer, config.dtype)
    print(f"{info['name']}: {describe(info)}; {engine.dtype} on {engine.device}, {engine.forward.backend}", file=sys.stderr)
    if prompt is not None:
        return complete(engine, prompt, config, options)
    while True:
        try:
            prompt = input("\n> ")
        except EOFError:
            print()
            return
        complete(engine, prompt, config, options)


def complete(engine: Engine, prompt: str, config: GenerateConfig, options: dict):
    """Prints n continuations of the prompt: a single one while it is made, several when all are."""
    seed = secrets.randbits(32) if config.seed is None else config.seed
    ids, notices = engine.encode(prompt)
    for notice in (f"seed {seed}", *notices):
        print(notice, file=sys.stderr)
    texts, tokens, reasons = [""] * config.n, [0] * config.n, [""] * config.n
    streams = config.n == 1 and not config.json
    print(prompt if streams else "", end="", flush=True)
    for piece in engine.pieces(engine.submit(ids, config.n, **{**options, "seed": seed})):
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.token is not None
        reasons[piece.index] = piece.reason
        print(piece.text if streams else "", end="", flush=True)
    if config.json:
        for i, text in enumerate(texts):
            print(json.dumps({"prompt": prompt, "text": text, "finish_reason": reasons[i], "prompt_tokens": len(ids),
                              "tokens": tokens[i], "seed": seed, "index": i}))
    else:
        print("" if streams else "\n--------\n".join(prompt + text for text in texts))


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(GenerateConfig))
