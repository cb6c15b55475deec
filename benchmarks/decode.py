"""Sampling: tokens/s of our engine, `transformers` and llama.cpp; quality of each precision.

    pip install -r requirements-interop.txt         # transformers and llama.cpp
    python -m benchmarks.decode
    python -m benchmarks.decode --rounds 5 --new-tokens 256
    python -m benchmarks.decode --device cuda --crowds 64 256 --bandwidth 4.8e12    # H200
    python -m benchmarks.decode --quality bundled --text input.txt    # perplexity, greedy tokens

Speeds are of GPT-2 124M with random weights, sampling with temperature 0.8 and top-k 50. Machines
drift, so read the ratios: medians over rounds in which each way runs once.
"""
import contextlib
import dataclasses
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from benchmarks.ratio import print_ratio
from checkpoint import load_model
from engine.packed import use_allowed_cores
from generate import Engine
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.gguf import save_gguf
from weights.huggingface import save_huggingface

# our precisions by device, the fastest last
PRECISIONS = {"cpu": ["float32", "float16", "int8"], "cuda": ["bfloat16"]}

# transformers' precisions; bfloat16 only where the CPU does not emulate it
TRANSFORMERS_PRECISIONS = {"cpu": ["float32"], "cuda": ["bfloat16"]}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    TRANSFORMERS_PRECISIONS["cpu"].append("bfloat16")

# GGUF's precisions, with llama.cpp's names for them
LLAMA = {"float32": "llama.cpp f32", "float16": "llama.cpp f16", "q8_0": "llama.cpp q8_0"}

# targets for one stream, as a multiple of the reference's speed
TARGETS = {"float32": 0.85, "float16": 1.1, "int8": 1.0, "bfloat16": 0.0}

SAMPLING = {"temperature": 0.8, "top_k": 50}


@dataclasses.dataclass
class Config:
    """Speeds by default, quality with --quality."""
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 256
    """New tokens of a single stream."""
    device: str = "cpu"
    crowds: tuple[int, ...] = (8, 32)
    """Numbers of streams."""
    crowd_tokens: int = 96
    """New tokens of each of several streams."""
    bandwidth: float | None = None
    """Memory bandwidth in bytes/s; measured on a CPU by default."""
    peers: bool = True
    """Run `transformers` and llama.cpp too."""
    quality: str | None = None
    """A trained model, to compare the perplexity and greedy tokens of its precisions."""
    text: Path | None = None
    """The text for --quality."""


def main(config: Config):
    use_allowed_cores()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads")
    if config.quality:
        measure_quality(config)
    else:
        measure_speeds(config)


# --------------------------------------------------------------------------------------------------
# Ours

def decode(engine: Engine, ids: list[int], streams: int, new_tokens: int) -> float:
    """Tokens/s while all streams are running; their prompts differ in the first token."""
    engine.scheduler.prefixes.entries.clear()
    requests, arrivals = [], []
    for i in range(streams):
        request = engine.submit([i, *ids[1:]], max_new_tokens=new_tokens, seed=i, **SAMPLING)
        times = []
        request.wake = lambda times=times: times.append(time.perf_counter())
        requests.append(request)
        arrivals.append(times)
    for request in requests:
        list(request)
    start = max(times[0] for times in arrivals)
    stop = min(times[-2] for times in arrivals)  # the last event is the end, not a token
    tokens = sum(start < moment <= stop for times in arrivals for moment in times)
    return tokens / (stop - start)


def prefill(engine: Engine, ids: list[int], use_cache: bool = False) -> float:
    """Tokens/s of a prompt, first new token included; `use_cache` allows cached prefixes."""
    if not use_cache:
        engine.scheduler.prefixes.entries.clear()
    began = time.perf_counter()
    next(iter(engine.submit(ids, max_new_tokens=1)))
    return len(ids) / (time.perf_counter() - began)


def speed_by_position(engine: Engine, ids: list[int]) -> dict[str, float]:
    """Tokens/s of one stream near positions 100 and 1000, and over half a context past its end."""
    prompt_tokens, block_size = 64, 1024
    request = engine.submit(ids[:prompt_tokens], seed=1, **SAMPLING,
                            max_new_tokens=block_size + 513 - prompt_tokens)
    times = []  # of the tokens from position `prompt_tokens` on
    request.wake = lambda: times.append(time.perf_counter())
    list(request)

    def speed(start: int, stop: int) -> float:
        return (stop - start) / (times[stop - prompt_tokens] - times[start - prompt_tokens])

    return {
        "at position 100": speed(70, 130),
        "at position 1000": speed(960, 1020),
        "past the context": speed(1023, 1535),
    }


# --------------------------------------------------------------------------------------------------
# The references

class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path):
        import llama_cpp  # noqa: PLC0415
        threads = torch.get_num_threads()
        with contextlib.redirect_stderr(io.StringIO()):
            self.model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads,
                                         n_threads_batch=threads, verbose=False)

    def decode(self, ids: list[int], new_tokens: int) -> float:
        """Tokens/s after the first token."""
        generated = 0
        for _ in self.model.generate(ids, top_k=50, top_p=1.0, min_p=0.0, temp=0.8, reset=True):
            generated += 1
            if generated == 1:
                began = time.perf_counter()
            if generated == new_tokens:
                return (generated - 1) / (time.perf_counter() - began)

    def prefill(self, ids: list[int]) -> float:
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(ids)
        return len(ids) / (time.perf_counter() - began)


def decode_with_transformers(model, ids: list[int], streams: int, new_tokens: int) -> float:
    """Tokens/s after the first token of each stream."""
    batch = torch.tensor([[i, *ids[1:]] for i in range(streams)], device=model.device)  # (B, T)
    times = []
    for length in 1, new_tokens:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(batch, max_new_tokens=length, do_sample=True, **SAMPLING,
                           pad_token_id=50256, eos_token_id=None)
        times.append(time.perf_counter() - began)
    return streams * (new_tokens - 1) / (times[1] - times[0])


def load_peers(config: Config, folder: Path, gpt: GPT, tokenizer) -> tuple[dict, dict]:
    """The same weights in transformers, by precision, and on a CPU in llama.cpp, by its name."""
    import transformers  # noqa: PLC0415
    save_huggingface(folder, gpt, tokenizer, torch.float32)
    hf_models = {}
    for dtype in TRANSFORMERS_PRECISIONS[config.device]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype))
        hf_models[dtype] = model.to(config.device)
    llama_models = {}
    if config.device == "cpu":
        for dtype, name in LLAMA.items():
            save_gguf(folder / f"{dtype}.gguf", gpt.cpu(), tokenizer, dtype)
            llama_models[name] = Llama(folder / f"{dtype}.gguf")
    return hf_models, llama_models


# --------------------------------------------------------------------------------------------------
# Speeds

@dataclasses.dataclass
class Comparison:
    """One of our ways and the references for it, as functions that return tokens/s."""
    subject: str
    reference: str
    ours: Callable[[], float]
    theirs: dict[str, Callable[[], float]]
    target: float


def measure_speeds(config: Config):
    torch.manual_seed(0)
    gpt, tokenizer = GPT(SIZES["gpt2"]).eval(), gpt2_tokenizer()
    ids = torch.randint(0, 50_000, (512,)).tolist()
    engines = {dtype: Engine(gpt.to(config.device), tokenizer, dtype)
               for dtype in PRECISIONS[config.device]}

    # run each way once per round
    with tempfile.TemporaryDirectory() as folder:
        peers = load_peers(config, Path(folder), gpt, tokenizer) if config.peers else ({}, {})
        comparisons = make_comparisons(config, engines, ids, *peers)
        ways = {}
        for comparison in comparisons:
            ways[f"ours {comparison.subject}"] = comparison.ours
            ways.update(comparison.theirs)
        for way in ways.values():
            way()  # warm up
        rounds = [{name: way() for name, way in ways.items()} for _ in range(config.rounds)]

    for name in ways:
        speeds = [speed[name] for speed in rounds]
        print(f"{statistics.median(speeds):8.1f} tokens/s  {name:42} "
              f"({min(speeds):.1f} to {max(speeds):.1f})")

    # against the references
    for comparison in comparisons:
        if comparison.theirs:
            ratios = []
            for speed in rounds:
                fastest = max(speed[name] for name in comparison.theirs)
                ratios.append(speed[f"ours {comparison.subject}"] / fastest)
            print_ratio(comparison.subject, ratios, f"times {comparison.reference}",
                        note_of(comparison.target))

    # many streams against few
    best = PRECISIONS[config.device][-1]
    few, many = (f"{best}, {streams_text(streams)}" for streams in config.crowds[:2])
    print_ratio(f"{many} in total", [speed[f"ours {many}"] / speed[f"ours {few}"]
                                     for speed in rounds],
                f"times {streams_text(config.crowds[0])}", note_of(1.0))

    # against the memory bandwidth: a token of one stream reads all weights once
    bandwidth = config.bandwidth or measure_bandwidth()
    for dtype in engines:
        size = gpt.num_parameters() * {"int8": 1, "float32": 4}.get(dtype, 2)  # bytes
        subject = f"{dtype}, 1 stream"
        limit = f"{bandwidth / size:.0f} tokens/s at {bandwidth / 1e9:.0f} GB/s"
        target = note_of(0.7 if config.device == "cuda" else 0.0)
        print_ratio(subject, [speed[f"ours {subject}"] * size / bandwidth for speed in rounds],
                    "of the memory-bandwidth limit", f"{limit}, {target}" if target else limit)

    # by position
    by_position = [speed_by_position(engines[best], ids) for _ in range(config.rounds)]
    for name, target in ("at position 1000", 0.7), ("past the context", 0.5):
        print_ratio(f"{best}, 1 stream {name}",
                    [speed[name] / speed["at position 100"] for speed in by_position],
                    "times its speed at position 100", note_of(target))

    # the first token of a prompt, without and with its cache
    engines[best].scheduler.prefixes.entries.clear()
    first, again = (len(ids) / prefill(engines[best], ids, use_cache=True) * 1000
                    for _ in range(2))
    print(f"first token of a 512-token prompt, {best}: {first:.0f} ms; "
          f"with the prompt in the cache: {again:.0f} ms")


def make_comparisons(config: Config, engines: dict[str, Engine], ids: list[int],
                     hf_models: dict, llama_models: dict) -> list[Comparison]:
    """One stream in each precision, several streams in the fastest, and a long prompt."""
    best = list(engines)[-1]
    prompt, comparisons = ids[:config.prompt_tokens], []

    def add_with_transformers(subject: str, streams: int, ours: Callable, target: float):
        theirs = {}
        for dtype, model in hf_models.items():
            theirs[f"transformers in {dtype}, {streams_text(streams)}"] = (
                lambda model=model: decode_with_transformers(
                    model, prompt, streams, config.crowd_tokens))
        reference = f"transformers in {' or '.join(hf_models)}"
        comparisons.append(Comparison(subject, reference, ours, theirs, target))

    # one stream in each precision, against llama.cpp if it is there
    for dtype, engine in engines.items():
        def one_stream(engine=engine):
            return decode(engine, prompt, 1, config.new_tokens)

        subject, target = f"{dtype}, 1 stream", TARGETS[dtype]
        if llama_models:
            name = LLAMA.get(dtype, LLAMA["q8_0"])
            theirs = {f"{name}, 1 stream": lambda model=llama_models[name]: model.decode(
                prompt, config.new_tokens)}
            comparisons.append(Comparison(subject, name, one_stream, theirs, target))
        else:
            add_with_transformers(subject, 1, one_stream, target)

    # the same with torch in the place of native.cpp
    if config.device == "cpu":
        by_torch = Engine(engines[best].model, engines[best].tokenizer, best, native=False)
        add_with_transformers(f"{best} without native.cpp, 1 stream", 1,
                              lambda: decode(by_torch, prompt, 1, config.new_tokens), 0.0)

    # several streams
    for streams in config.crowds:
        add_with_transformers(
            f"{best}, {streams_text(streams)}", streams,
            lambda streams=streams: decode(engines[best], prompt, streams, config.crowd_tokens),
            8.0 if streams == 8 else 1.0)

    # a long prompt, against llama.cpp's fastest precision
    theirs = {f"{name}, prompt of 512 tokens": lambda model=model: model.prefill(ids)
              for name, model in llama_models.items()}
    comparisons.append(Comparison(f"{best}, prompt of 512 tokens",
                                  "the fastest of llama.cpp f32, f16 and q8_0",
                                  lambda: prefill(engines[best], ids), theirs, 1.5))
    return comparisons


def measure_bandwidth() -> float:
    """Bytes/s of a sum over a large tensor on all threads, the best of eight."""
    numbers, best = torch.ones(2**27), 0.0
    for _ in range(8):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


def streams_text(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def note_of(target: float) -> str:
    return f"target {target}" if target else ""


# --------------------------------------------------------------------------------------------------
# Quality

def measure_quality(config: Config):
    """Perplexity of a text, and the share of greedy tokens equal to the float32 model's, given the
    same context."""
    gpt, tokenizer, info = load_model(config.quality)
    text = config.text.read_text(encoding="utf-8")
    text = text[-len(text) // 10:][:40_000]  # within the validation part of a training text
    exact_nats, exact_greedy = None, None
    for dtype in "float32", "bfloat16", "float16", "int8":
        engine = Engine(gpt, tokenizer, dtype)
        tokens = engine.inspect(text, top=1)[1:]
        nats = -statistics.fmean(token["logprob"] for token in tokens)
        greedy = [token["top"][0][0] for token in tokens]
        if exact_nats is None:
            exact_nats, exact_greedy = nats, greedy
        equal = statistics.fmean(a == b for a, b in zip(greedy, exact_greedy))
        print(f"{info['name']}, {dtype}, {engine.forward.backend}: "
              f"perplexity {math.exp(nats):.4f} ({100 * math.expm1(nats - exact_nats):+.3f}%), "
              f"greedy tokens equal to float32's: {100 * equal:.2f}%")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
