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
from functools import partial
from pathlib import Path

import torch
import tyro

from benchmarks.ratio import divide, print_ratio
from checkpoint import load_model
from engine.packed import use_allowed_cores
from generate import Engine
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.gguf import save_gguf
from weights.huggingface import save_huggingface

# our precisions by device, the fastest last
PRECISIONS = {"cpu": ["float32", "float16", "int8"], "cuda": ["bfloat16"]}

# transformers' precisions; bfloat16 only if the CPU does not emulate it
TRANSFORMERS_PRECISIONS = {"cpu": ["float32"], "cuda": ["bfloat16"]}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    TRANSFORMERS_PRECISIONS["cpu"].append("bfloat16")

# GGUF's precisions, with llama.cpp's names for them
LLAMA = {"float32": "llama.cpp f32", "float16": "llama.cpp f16", "q8_0": "llama.cpp q8_0"}

PROMPT_TOKENS = 64
CROWD_TOKENS = 96  # new tokens of each of several streams
SAMPLING = {"temperature": 0.8, "top_k": 50}


@dataclasses.dataclass
class Config:
    """Speeds by default, quality with --quality."""
    rounds: int = 3
    new_tokens: int = 256
    """New tokens of a single stream."""
    device: str = "cpu"
    crowds: tuple[int, ...] = (8, 32)
    """Numbers of streams."""
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
    request = engine.submit(ids[:PROMPT_TOKENS], seed=1, **SAMPLING,
                            max_new_tokens=1024 + 513 - PROMPT_TOKENS)
    times = []  # of the tokens from position PROMPT_TOKENS on
    request.wake = lambda: times.append(time.perf_counter())
    list(request)

    def speed(start: int, stop: int) -> float:
        return (stop - start) / (times[stop - PROMPT_TOKENS] - times[start - PROMPT_TOKENS])

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


def measure_speeds(config: Config):
    torch.manual_seed(0)
    gpt, tokenizer = GPT(SIZES["gpt2"]).eval(), gpt2_tokenizer()
    ids = torch.randint(0, 50_000, (512,)).tolist()
    engines = {dtype: Engine(gpt.to(config.device), tokenizer, dtype)
               for dtype in PRECISIONS[config.device]}
    with tempfile.TemporaryDirectory() as folder:
        peers = load_peers(config, Path(folder), gpt, tokenizer) if config.peers else ({}, {})
        comparisons = make_comparisons(config, engines, ids, *peers)
        speeds = run_rounds(comparisons, config.rounds)

    for name, values in speeds.items():
        print(f"{statistics.median(values):8.1f} tokens/s  {name:42} "
              f"({min(values):.1f} to {max(values):.1f})")
    compare_with_references(comparisons, speeds)
    best = list(engines)[-1]
    compare_crowds(best, config.crowds, speeds)
    bandwidth = config.bandwidth or measure_bandwidth()
    for dtype in engines:
        compare_with_bandwidth(dtype, gpt.num_parameters(), bandwidth, speeds)
    compare_positions(best, engines[best], ids, config.rounds)
    time_first_token(best, engines[best], ids)


def make_comparisons(config: Config, engines: dict[str, Engine], ids: list[int],
                     hf_models: dict, llama_models: dict) -> list[Comparison]:
    """One stream in each precision, several streams in the fastest, and a long prompt."""
    best = list(engines)[-1]
    prompt = ids[:PROMPT_TOKENS]
    comparisons = []

    def add_with_transformers(subject: str, streams: int, ours: Callable):
        theirs = {}
        for dtype, model in hf_models.items():
            theirs[f"transformers in {dtype}, {streams_text(streams)}"] = partial(
                decode_with_transformers, model, prompt, streams, CROWD_TOKENS)
        reference = f"transformers in {' or '.join(hf_models)}"
        comparisons.append(Comparison(subject, reference, ours, theirs))

    # one stream in each precision, against llama.cpp if it is there
    for dtype, engine in engines.items():
        subject = f"{dtype}, 1 stream"
        ours = partial(decode, engine, prompt, 1, config.new_tokens)
        if llama_models:
            name = LLAMA.get(dtype, LLAMA["q8_0"])
            theirs = {f"{name}, 1 stream": partial(
                llama_models[name].decode, prompt, config.new_tokens)}
            comparisons.append(Comparison(subject, name, ours, theirs))
        else:
            add_with_transformers(subject, 1, ours)

    # the same with torch in the place of native.cpp
    if config.device == "cpu":
        by_torch = Engine(engines[best].model, engines[best].tokenizer, best, native=False)
        add_with_transformers(f"{best} without native.cpp, 1 stream", 1,
                              partial(decode, by_torch, prompt, 1, config.new_tokens))

    # several streams
    for streams in config.crowds:
        add_with_transformers(f"{best}, {streams_text(streams)}", streams,
                              partial(decode, engines[best], prompt, streams, CROWD_TOKENS))

    # a long prompt, against llama.cpp's fastest precision
    theirs = {f"{name}, prompt of 512 tokens": partial(model.prefill, ids)
              for name, model in llama_models.items()}
    comparisons.append(Comparison(f"{best}, prompt of 512 tokens",
                                  "the fastest of llama.cpp f32, f16 and q8_0",
                                  partial(prefill, engines[best], ids), theirs))
    return comparisons


def run_rounds(comparisons: list[Comparison], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each way in each round."""
    ways = {}
    for comparison in comparisons:
        ways[f"ours {comparison.subject}"] = comparison.ours
        ways.update(comparison.theirs)
    for way in ways.values():
        way()  # warm up
    speeds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(way())
    return speeds


def compare_with_references(comparisons: list[Comparison], speeds: dict[str, list[float]]):
    for comparison in comparisons:
        if comparison.theirs:
            fastest = map(max, zip(*(speeds[name] for name in comparison.theirs)))
            ratios = divide(speeds[f"ours {comparison.subject}"], fastest)
            print_ratio(comparison.subject, ratios, f"times {comparison.reference}")


def compare_crowds(best: str, crowds: tuple[int, ...], speeds: dict[str, list[float]]):
    """Many streams against few."""
    few, many = (f"{best}, {streams_text(streams)}" for streams in crowds[:2])
    ratios = divide(speeds[f"ours {many}"], speeds[f"ours {few}"])
    print_ratio(f"{many} in total", ratios, f"times {streams_text(crowds[0])}")


def compare_with_bandwidth(dtype: str, parameters: int, bandwidth: float,
                           speeds: dict[str, list[float]]):
    """One stream against the memory bandwidth, as each token reads all weights once."""
    limit = bandwidth / (parameters * {"int8": 1, "float32": 4}.get(dtype, 2))  # tokens/s
    subject = f"{dtype}, 1 stream"
    print_ratio(subject, [speed / limit for speed in speeds[f"ours {subject}"]],
                "of the memory-bandwidth limit",
                f"{limit:.0f} tokens/s at {bandwidth / 1e9:.0f} GB/s")


def compare_positions(best: str, engine: Engine, ids: list[int], rounds: int):
    """One stream late in the context, and past it, against its beginning."""
    speeds = [speed_by_position(engine, ids) for _ in range(rounds)]
    for name in "at position 1000", "past the context":
        print_ratio(f"{best}, 1 stream {name}",
                    [speed[name] / speed["at position 100"] for speed in speeds],
                    "times its speed at position 100")


def time_first_token(best: str, engine: Engine, ids: list[int]):
    """The first token of a prompt, without its cache and with it."""
    engine.scheduler.prefixes.entries.clear()
    first, again = (len(ids) / prefill(engine, ids, use_cache=True) * 1000 for _ in range(2))
    print(f"first token of a 512-token prompt, {best}: {first:.0f} ms; "
          f"with the prompt in the cache: {again:.0f} ms")


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


# --------------------------------------------------------------------------------------------------
# Quality

def measure_quality(config: Config):
    """Perplexity of a text, and the share of greedy tokens equal to the float32 model's, given the
    same context."""
    gpt, tokenizer, info = load_model(config.quality)
    text = config.text.read_text(encoding="utf-8")
    text = text[-len(text) // 10:][:40_000]  # within the validation part of a training text
    for dtype in "float32", "bfloat16", "float16", "int8":
        engine = Engine(gpt, tokenizer, dtype)
        tokens = engine.inspect(text, top=1)[1:]
        nats = -statistics.fmean(token["logprob"] for token in tokens)
        greedy = [token["top"][0][0] for token in tokens]
        if dtype == "float32":
            exact_nats, exact_greedy = nats, greedy
        equal = statistics.fmean(a == b for a, b in zip(greedy, exact_greedy))
        print(f"{info['name']}, {dtype}, {engine.forward.backend}: "
              f"perplexity {math.exp(nats):.4f} ({100 * math.expm1(nats - exact_nats):+.3f}%), "
              f"greedy tokens equal to float32's: {100 * equal:.2f}%")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
