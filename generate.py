"""The sampling engine: generates text from a model and its tokenizer, and scores texts.

    python generate.py -p "The history of" -n 3 --seed 42    # without -p: interactive
    python generate.py -m log/shakespeare-char-cpu --temperature 0.8 --top-k 50
    python generate.py --file beginning.txt --stop "\n\n" --json

    engine = Engine(*load_model("bundled")[:2])
    for piece in engine.stream("The history of", max_new_tokens=200, seed=42):
        print(piece, end="", flush=True)

An engine can be used from any number of threads: engine/scheduler.py runs all their requests
together, engine/sampling.py samples the tokens, and engine/reader.py turns them into text.

A model sees at most `block_size` tokens. A longer prompt loses its beginning. When generation has
filled the context, the engine keeps the last half and prefills it again.
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
from typing import Annotated, Literal

from common.program import report_user_errors

import torch
import tyro

from checkpoint import describe, load_model
from common.errors import UserError
from ddp import auto_dtype, dtype_name, pick_device
from engine import native
from engine.cache import CHUNK
from engine.forward import Forward, Segment
from engine.packed import supports_dtype, use_allowed_cores
from engine.reader import Piece, Reader
from engine.sampling import Sampling
from engine.scheduler import Request, Scheduler
from model import GPT
from tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
LARGE_MODEL = 20_000_000  # parameters; larger weights do not fit a CPU's cache, so int8 is faster


# --------------------------------------------------------------------------------------------------
# The engine

class Engine:
    """Samples from a model and scores texts with it.

    Args:
        dtype: "auto" is bfloat16 on CUDA, or float16 on GPUs without bfloat16. On a CPU it is int8
            for models with 20 million parameters or more, whose speed depends on the bytes read,
            and float32 for smaller ones.
        native: Use the C++ kernels if the machine supports them; otherwise torch computes all.
        limits: The scheduler's: `max_running`, `max_waiting`, `deadline_s`, `prefix_bytes`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: Dtype = "auto",
                 native: bool = True, **limits):
        self.tokenizer = tokenizer
        self.block_size = model.config.block_size
        self.native, self.limits = native, limits
        self.device = next(model.parameters()).device
        if dtype == "auto":
            large = model.num_parameters() >= LARGE_MODEL
            if self.device.type == "cpu":
                dtype = "int8" if large and supports_dtype("int8", self.device) else "float32"
            else:
                dtype = dtype_name(auto_dtype(self.device))
        if not supports_dtype(dtype, self.device):
            raise UserError(f"{dtype} needs an x86 CPU, but the device is {self.device}: "
                            "choose another --dtype.")
        self.dtype = dtype
        # on a CPU the weights stay float32 here, and `forward` packs them
        weight_dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, dtype)
        if any(p.dtype != weight_dtype for p in model.parameters()):
            model = copy.deepcopy(model).to(weight_dtype)
        self.model = model

    @functools.cached_property
    def forward(self) -> Forward:
        """The model's forward step. Built on first use, because packing the weights takes time."""
        make = native.make_forward if self.native else Forward
        return make(self.model, self.dtype)

    @property
    def packed(self) -> GPT:
        """The model as torch runs it: on a CPU with its matrices packed in the engine's dtype."""
        return self.forward.model

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        return Scheduler(self.forward, self.tokenizer.vocab_size, self.tokenizer.eot,
                         self.block_size, **self.limits)

    # ----------------------------------------------------------------------------------------------
    # Prompts

    @functools.cached_property
    def max_chars(self) -> int:
        """A text with more characters than this cannot fit into the context."""
        token_ids = range(self.tokenizer.vocab_size)
        longest = max(len(self.tokenizer.decode_bytes([i])) for i in token_ids)  # in bytes
        return longest * self.block_size

    def encode(self, prompt: str) -> tuple[list[int], list[str]]:
        """(token ids for the model, notices about the parts of the prompt that it does not see).

        An empty prompt becomes `<|endoftext|>`, or a line break if the tokenizer has no such token.
        """
        notices = []
        prompt, unknown = self.tokenizer.replace_unknown(prompt)
        if unknown:
            notices.append("The model's alphabet lacks these characters, which were replaced or "
                           f"left out: {unknown}")
        ids = self.tokenizer.encode(prompt)
        if len(ids) > self.block_size:
            notices.append(f"The prompt has {len(ids):,} tokens, but the model reads only "
                           f"{self.block_size:,}: its beginning was left out.")
            ids = ids[-self.block_size:]
        if not ids:
            ids = self.empty_prompt()
        return ids, notices

    def empty_prompt(self) -> list[int]:
        if self.tokenizer.eot is not None:
            return [self.tokenizer.eot]
        line_break, _ = self.tokenizer.replace_unknown("\n")
        return self.tokenizer.encode(line_break) or [0]

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, which may be ids already. Notices become warnings."""
        if not isinstance(prompt, str):
            return prompt
        ids, notices = self.encode(prompt)
        for notice in notices:
            warnings.warn(notice, stacklevel=3)
        return ids

    # ----------------------------------------------------------------------------------------------
    # Generating

    def submit(self, prompt: str | list[int], n: int = 1, client: str | None = None,
               **sampling) -> Request:
        """Requests n continuations of a prompt (text, or ids from `encode`) from the scheduler.

        Sample i has its own random stream, derived from (seed, i). It ends after max_new_tokens, or
        before `<|endoftext|>`. Requests of one `client` share its places. The other options are the
        fields of `Sampling`. Raises UserError for values out of range, and Busy.
        """
        sampling = Sampling(**sampling)
        return self.scheduler.submit(self.prompt_ids(prompt), n, sampling, client)

    def pieces(self, request: Request) -> Iterator[Piece]:
        """The text of a request, piece by piece. On an event loop, use a `PieceStream` instead."""
        reader = Reader(self.tokenizer, request)
        for event in request:
            piece = reader.read(event)
            if piece:
                yield piece

    def stream(self, prompt: str | list[int], **sampling) -> Iterator[str]:
        """Yields the continuation of a prompt as it is generated, usually one token at a time.

        `prompt` is text, or ids from `encode`; the options are the fields of `Sampling`.
        """
        for piece in self.pieces(self.submit(prompt, **sampling)):
            if piece.token or piece.text:
                yield piece.text

    def generate(self, prompt: str | list[int], n: int = 1, **sampling) -> list[str]:
        """n continuations of one prompt, without the prompt, which is prefilled only once."""
        texts = [""] * n
        for piece in self.pieces(self.submit(prompt, n, **sampling)):
            texts[piece.index] += piece.text
        return texts

    # ----------------------------------------------------------------------------------------------
    # Scoring

    def score(self, text: str) -> list[float | None]:
        """The log-probability (nats) of each token of a text, given the tokens before it.

        `<|endoftext|>` precedes the text. If the tokenizer has no such token, the first score is
        None.
        """
        return [token["logprob"] for token in self.inspect(text, top=0)]

    def inspect(self, text: str | list[int], top: int = 10) -> list[dict]:
        """What the model predicts at each token of a text, or of token ids.

        Returns a dict for each token: "id", "text", "logprob" (nats), and "top", the likeliest
        tokens at its position as (id, logprob) pairs. `<|endoftext|>` precedes a text if the
        tokenizer has it. Nothing precedes ids, so the first one has no log-probability. A text
        longer than the context is read in windows that overlap by half.
        """
        context = []
        ids = text
        if isinstance(text, str):
            if self.tokenizer.eot is not None:
                context = [self.tokenizer.eot]
            ids = context + self.tokenizer.encode(text)
        tokens = [{"id": i, "text": self.tokenizer.decode([i]), "logprob": None, "top": []}
                  for i in ids]

        position = 1  # of the next token to score; nothing predicts the first one
        while position < len(ids):
            # the next window, which overlaps the previous one by half
            first = 0 if position < self.block_size else position - max(1, self.block_size // 2)
            inputs = ids[first:min(first + self.block_size, len(ids) - 1)]
            cache = self.forward.new_cache()
            # run it in chunks: the logits of a whole window would be large
            for start in range(0, len(inputs), CHUNK):
                chunk = inputs[start:start + CHUNK]
                rows = range(position - 1 - first - start, len(chunk))  # not scored yet
                logits = self.forward([Segment(cache, start, chunk)], rows)
                for logprobs in logits[:, :self.tokenizer.vocab_size].log_softmax(-1):  # (V,) each
                    best = logprobs.topk(min(top, len(logprobs)))
                    tokens[position]["logprob"] = logprobs[ids[position]].item()
                    tokens[position]["top"] = list(zip(best.indices.tolist(), best.values.tolist()))
                    position += 1
        return tokens[len(context):]


# --------------------------------------------------------------------------------------------------
# The command line

@dataclasses.dataclass
class ModelConfig:
    """The options of every program that runs a model: which one, where and in what precision."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """bundled[:name], a run folder, a .pt file, a Hugging Face folder or a Hub id. Default: the
    newest run, or the bundled model if there is none."""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA (float16 on older GPUs); on a CPU int8 for models with 20 million
    parameters or more, and float32 for smaller ones."""

    def load(self, auto_on_cpu: Dtype = "auto") -> tuple[Engine, dict]:
        """(the model's engine, its info as `load_model` returns it).

        `auto_on_cpu` replaces a --dtype auto on a CPU, where the engine's own choice, made for
        sampling, does not suit evaluation.
        """
        device = pick_device(self.device)
        dtype = auto_on_cpu if self.dtype == "auto" and device.type == "cpu" else self.dtype
        model, tokenizer, info = load_model(self.model, device)
        return Engine(model, tokenizer, dtype), info


@dataclasses.dataclass
class GenerateConfig(ModelConfig):
    """Continues a prompt. Without one, asks for prompts until the input ends."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """The text to continue."""
    file: Path | None = None
    """A file with the text to continue; - is the standard input."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of samples."""
    max_new_tokens: int = 256
    """Length of each sample, in tokens."""
    temperature: float = 0.8
    """Lower is more predictable, higher is more surprising; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this total probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and the output become less likely."""
    stop: tuple[str, ...] = ()
    """A sample ends before the first of these strings; \\n is a line break."""
    seed: int | None = None
    """The same seed gives the same text. Default: a random seed, which is printed."""
    json: bool = False
    """Print each sample as a JSON object."""


def main(config: GenerateConfig):
    # check the settings before a model is loaded
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "logprobs"]
    settings = {name: getattr(config, name) for name in names}
    settings["stop"] = tuple(stop.replace("\\n", "\n") for stop in config.stop)
    Sampling(**settings)

    # read the prompt
    prompt = config.prompt
    if config.file is not None:
        if str(config.file) == "-":
            prompt = sys.stdin.read()
        else:
            prompt = config.file.read_text(encoding="utf-8", errors="replace")

    # load the model
    use_allowed_cores()
    engine, info = config.load()
    backend = f"{engine.dtype} on {engine.device}, {engine.forward.backend}"
    print(f"{info['name']}: {describe(info)}; {backend}", file=sys.stderr)

    if prompt is not None:
        return complete(engine, prompt, config, settings)
    while True:
        try:
            prompt = input("\n> ")
        except EOFError:
            print()
            return
        complete(engine, prompt, config, settings)


def complete(engine: Engine, prompt: str, config: GenerateConfig, settings: dict):
    """Prints n continuations of a prompt: a single one as it is generated, several at the end."""
    seed = secrets.randbits(32) if config.seed is None else config.seed
    ids, notices = engine.encode(prompt)
    for line in (f"seed {seed}", *notices):
        print(line, file=sys.stderr)

    samples = [[] for _ in range(config.n)]  # their pieces
    streaming = config.n == 1 and not config.json
    if streaming:
        print(prompt, end="", flush=True)
    for piece in engine.pieces(engine.submit(ids, config.n, **(settings | {"seed": seed}))):
        samples[piece.index].append(piece)
        if streaming:
            print(piece.text, end="", flush=True)

    texts = ["".join(piece.text for piece in pieces) for pieces in samples]
    if config.json:
        for i, (text, pieces) in enumerate(zip(texts, samples)):
            tokens = sum(piece.token is not None for piece in pieces)
            print(json.dumps({"prompt": prompt, "text": text, "finish_reason": pieces[-1].reason,
                              "prompt_tokens": len(ids), "tokens": tokens, "seed": seed,
                              "index": i}))
    elif streaming:
        print()
    else:
        print("\n--------\n".join(prompt + text for text in texts))


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(GenerateConfig))
