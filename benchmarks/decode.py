"""Tokens a second of the engine, of `transformers` and of llama.cpp, turn and turn about; and what each precision
costs in quality.

    python -m benchmarks.decode                                       # everything; needs requirements-interop.txt
    python -m benchmarks.decode --rounds 5 --new-tokens 256
    python -m benchmarks.decode --device cuda --crowds 64 256 --bandwidth 4.8e12    # H200; --bandwidth is its data sheet's
    python -m benchmarks.decode --quality bundled --text input.txt    # perplexity and greedy tokens of a trained model

The speeds are of GPT-2 124M with random weights, sampling with temperature 0.8 and top-k 50. Machines drift: read the ratios,
which are medians over rounds in which each way ran once.
"""


import contextlib
import dataclasses
import io
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro

from checkpoint import load_model
from engine.packed import use_allowed_cores
from generate import Engine
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer
from weights.gguf import save_gguf
from weights.huggingface import save_huggingface

PRECISIONS = {"cpu": ["float32", "float16", "int8"], "cuda": ["bfloat16"]}  # ours, the best last
PEER_PRECISIONS = {"cpu": ["float32"] + ["bfloat16"] * torch.ops.mkldnn._is_mkldnn_bf16_supported(),  # others emulate it
                   "cuda": ["bfloat16"]}
WANTED = {"float32": 0.85, "float16": 1.1, "int8": 1.0, "bfloat16": 0.0}  # times llama.cpp's speed
LLAMA = {"float32": "llama.cpp f32", "float16": "llama.cpp f16", "q8_0": "llama.cpp q8_0"}


@dataclasses.dataclass
class Config:
    """Measures."""
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 256
    device: str = "cpu"
    crowds: tuple[int, ...] = (8, 32)
    """Numbers of streams."""
    bandwidth: float | None = None
    """Bytes a second that memory can be read with; measured on a CPU when not given."""
    crowd_tokens: int = 96
    """New tokens of each stream, where there are several."""
    peers: bool = True
    """Run `transformers` and llama.cpp too."""
    quality: str | None = None
    """A trained model, whose perplexity and greedy tokens are compared between precisions."""
    text: Path | None = None
    """The text that its perplexity is of."""


def count(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def clear(engine: Engine):
    engine.scheduler.prefixes.entries.clear()


def decode(engine: Engine, ids: list[int], streams: int, new_tokens: int) -> float:
    """Tokens a second while all streams, of prompts that differ, are being written."""
    clear(engine)
    times, options = [[] for _ in range(streams)], {"max_new_tokens": new_tokens, "temperature": 0.8, "top_k": 50}
    requests = [engine.submit([i, *ids[1:]], seed=i, **options) for i in range(streams)]
    for request, made in zip(requests, times):
        request.wake = lambda made=made: made.append(time.perf_counter())
    for request in requests:
        list(request)
    start, stop = max(made[0] for made in times), min(made[-2] for made in times)  # the last is not a token but the end
    return sum(start < moment <= stop for made in times for moment in made) / (stop - start)


def prompt(engine: Engine, ids: list[int], kept: bool = False) -> float:
    """Tokens a second of a prompt, its first token included; what was `kept` of earlier ones may serve."""
    if not kept:
        clear(engine)
    began = time.perf_counter()
    next(iter(engine.submit(ids, max_new_tokens=1)))
    return len(ids) / (time.perf_counter() - began)


class Llama:
    def __init__(self, path: Path):
        import llama_cpp  # noqa: PLC0415
        with contextlib.redirect_stderr(io.StringIO()):
            self.model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False,
                                         n_threads_batch=torch.get_num_threads())

    def decode(self, ids: list[int], new_tokens: int) -> float:
        made = 0
        for _ in self.model.generate(ids, top_k=50, top_p=1.0, min_p=0.0, temp=0.8, reset=True):
            made += 1
            if made == 1:
                began = time.perf_counter()
            if made == new_tokens:
                return (made - 1) / (time.perf_counter() - began)

    def prompt(self, ids: list[int]) -> float:
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(ids)
        return len(ids) / (time.perf_counter() - began)


def transformers_decode(model, ids: list[int], streams: int, new_tokens: int) -> float:
    """Tokens a second after the first of each stream."""
    batch = torch.tensor([[i, *ids[1:]] for i in range(streams)], device=model.device)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "pad_token_id": 50256, "eos_token_id": None}
    times = []
    for length in 1, new_tokens:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(batch, max_new_tokens=length, **options)
        times.append(time.perf_counter() - began)
    return streams * (new_tokens - 1) / (times[1] - times[0])


def positions(engine: Engine, ids: list[int]) -> dict[str, float]:
    """Tokens a second of one stream around positions 100 and 1000, and on average over half a context past its end."""
    times, request = [], engine.submit(ids[:64], max_new_tokens=1024 + 513 - 64, temperature=0.8, top_k=50, seed=1)
    request.wake = lambda: times.append(time.perf_counter())
    list(request)

    def speed(start: int, stop: int) -> float:
        return (stop - start) / (times[stop - 64] - times[start - 64])
    return {"at 100": speed(70, 130), "at 1000": speed(960, 1020), "past the context": speed(1023, 1535)}


def read_bandwidth() -> float:
    """Bytes a second that a sum reads from memory, all threads together; the best of a few."""
    numbers, best = torch.ones(2**27), 0
    for _ in range(8):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


class Ways:
    """Ways to write, by their names, and which of the peers' each of ours is compared with, at what ratio it is wanted."""

    def __init__(self, config: Config):
        self.config, self.all, self.peers = config, {}, {}

    def add(self, name: str, way, theirs: dict = (), wanted: float = 0.0):
        self.all[name] = way
        if theirs:
            self.all.update(theirs)
            self.peers[name] = list(theirs), wanted

    def rounds(self) -> list[dict[str, float]]:
        """Tokens a second of each way, round after round."""
        for way in self.all.values():
            way()  # the first time is slower
        return [{name: way() for name, way in self.all.items()} for _ in range(self.config.rounds)]


def speeds(config: Config):
    """Each of our ways with the peers' that it is compared with beside it, round after round."""
    torch.manual_seed(0)
    gpt, tokenizer, ways = GPT(SIZES["gpt2"]).eval(), gpt2_tokenizer(), Ways(config)
    ids = torch.randint(0, 50_000, (512,)).tolist()
    engines = {dtype: Engine(gpt.to(config.device), tokenizer, dtype) for dtype in PRECISIONS[config.device]}
    with tempfile.TemporaryDirectory() as folder:
        add_ways(ways, engines, ids, *load_peers(config, Path(folder), gpt, tokenizer) if config.peers else ({}, {}))
        rounds = ways.rounds()
    for name in ways.all:
        values = [each[name] for each in rounds]
        print(f"{statistics.median(values):8.1f} tokens/s  {name:36} ({min(values):.1f} to {max(values):.1f})")
    for name, (theirs, wanted) in ways.peers.items():
        say_ratio([each[name] / max(each[other] for other in theirs) for each in rounds],
                  f"{name}, against {' and '.join(other.partition(',')[0] for other in theirs)}", wanted)
    best = PRECISIONS[config.device][-1]
    few, many = (f"ours {best}, {count(streams)}" for streams in config.crowds[:2])
    say_ratio([each[many] / each[few] for each in rounds], f"{many} in total, against {few}", 1.0)
    bandwidth = config.bandwidth or read_bandwidth()
    for dtype in engines:
        size = gpt.num_parameters() * {"int8": 1, "float32": 4}.get(dtype, 2)
        say_ratio([each[f"ours {dtype}, 1 stream"] * size / bandwidth for each in rounds],
                  f"ours {dtype}, 1 stream, of what memory allows; {bandwidth / size:.0f} tokens/s at "
                  f"{bandwidth / 1e9:.0f} GB/s", 0.7 * (config.device == "cuda"))
    measured = [positions(engines[best], ids) for _ in range(config.rounds)]
    for name, wanted in ("at 1000", 0.7), ("past the context", 0.5):
        say_ratio([each[name] / each["at 100"] for each in measured], f"ours {best}, 1 stream, {name} against at 100", wanted)
    clear(engines[best])
    first, again = (len(ids) / prompt(engines[best], ids, kept=True) * 1000 for _ in range(2))
    print(f"first token of a 512-token prompt, {best}: {first:.0f} ms; again, from the cache: {again:.0f} ms")


def load_peers(config: Config, folder: Path, gpt: GPT, tokenizer) -> tuple[dict, dict]:
    """The same weights in transformers, by precision, and in llama.cpp, by our name of its kind; none of the latter on a GPU."""
    import transformers  # noqa: PLC0415
    save_huggingface(folder, gpt, tokenizer, torch.float32)
    hf = {dtype: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(config.device)
          for dtype in PEER_PRECISIONS[config.device]}
    llama = {}
    for dtype, name in LLAMA.items() if config.device == "cpu" else ():
        save_gguf(folder / f"{dtype}.gguf", gpt.cpu(), tokenizer, dtype)
        llama[name] = Llama(folder / f"{dtype}.gguf")
    return hf, llama


def add_ways(ways: Ways, engines: dict[str, Engine], ids: list[int], hf: dict, llama: dict):
    """One stream in each precision, crowds in the best, and a long prompt; beside each the peers that do the same."""
    config, best = ways.config, list(engines)[-1]
    start, new, crowd = ids[:config.prompt_tokens], config.new_tokens, config.crowd_tokens

    def generate(streams: int) -> dict:
        return {f"transformers {dtype}, {count(streams)}": lambda m=m: transformers_decode(m, start, streams, crowd)
                for dtype, m in hf.items()}
    for dtype, engine in engines.items():
        name = LLAMA.get(dtype, LLAMA["q8_0"])
        theirs = {f"{name}, 1 stream": lambda m=name: llama[m].decode(start, new)} if llama else generate(1)
        ways.add(f"ours {dtype}, 1 stream", lambda e=engine: decode(e, start, 1, new), theirs, WANTED[dtype])
    if config.device == "cpu":
        by_torch = Engine(engines[best].model, engines[best].tokenizer, best, native=False)
        ways.add(f"ours {best} by torch, 1 stream", lambda: decode(by_torch, start, 1, new), generate(1))
    for streams in config.crowds:
        ways.add(f"ours {best}, {count(streams)}", lambda n=streams: decode(engines[best], start, n, crowd), generate(streams),
                 8.0 if streams == 8 else 1.0)
    ways.add(f"ours {best}, prompt of 512", lambda: prompt(engines[best], ids),
             {f"{name}, prompt of 512": lambda m=m: m.prompt(ids) for name, m in llama.items()}, 1.5)


def say_ratio(values: list[float], what: str, wanted: float):
    wish = f", wanted {wanted}" if wanted else ""
    print(f"= {statistics.median(values):.2f} {what}; {min(values):.2f} to {max(values):.2f}{wish}")


def quality(config: Config):
    """Perplexity of a text, and how many of the float32 model's greedy tokens each precision chooses, given the same before."""
    gpt, tokenizer, info = load_model(config.quality)
    text = config.text.read_text(encoding="utf-8")
    text = text[-len(text) // 10:][:40_000]  # of what a model was trained on, its validation part
    exact = None
    for dtype in "float32", "bfloat16", "float16", "int8":
        engine = Engine(gpt, tokenizer, dtype)
        tokens = engine.inspect(text, top=1)[1:]
        nats = -statistics.fmean(token["logprob"] for token in tokens)
        greedy = [token["top"][0][0] for token in tokens]
        exact = exact or (nats, greedy)
        equal = statistics.fmean(a == b for a, b in zip(greedy, exact[1]))
        print(f"{info['name']}, {dtype}, {engine.forward.backend}: perplexity {math.exp(nats):.4f} "
              f"({100 * math.expm1(nats - exact[0]):+.3f}%), greedy tokens equal to float32's: {100 * equal:.2f}%")


def main(config: Config):
    use_allowed_cores()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    if config.quality:
        quality(config)
    else:
        speeds(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
