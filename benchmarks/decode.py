"""Tokens a second of the engine, of `transformers` and of llama.cpp, turn and turn about; and what each precision
costs in quality.

    python benchmarks/decode.py                                       # everything; needs requirements-interop.txt
    python benchmarks/decode.py --rounds 5 --new-tokens 256
    python benchmarks/decode.py --quality bundled --text input.txt    # perplexity and greedy tokens of a trained model

The speeds are of GPT-2 124M with random weights, sampling with temperature 0.8 and top-k 50. Machines drift: read the ratios,
which are medians over rounds in which each way ran once.
"""
import sys

sys.path.append(sys.path.pop(0).removesuffix("benchmarks"))  # the repository, and not tokenize.py beside this file

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
from formats import save_gguf, save_huggingface
from generate import Engine
from kernels import use_allowed_cores
from likelihood import perplexity
from model import GPT, SIZES
from tokenizer import gpt2_tokenizer

PRECISIONS = ["float32", "float16", "int8"]
PEER_PRECISIONS = ["float32"] + ["bfloat16"] * torch.ops.mkldnn._is_mkldnn_bf16_supported()  # others emulate it
LLAMA = {"float32": "llama.cpp f32", "float16": "llama.cpp f16", "q8_0": "llama.cpp q8_0"}


@dataclasses.dataclass
class Config:
    """Measures."""
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 256
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


def prompt(engine: Engine, ids: list[int]) -> float:
    """Tokens a second of a prompt, its first token included."""
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
    batch = torch.tensor([[i, *ids[1:]] for i in range(streams)])
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


def speeds(config: Config):
    torch.manual_seed(0)
    gpt, tokenizer = GPT(SIZES["gpt2"]).eval(), gpt2_tokenizer()
    ids = torch.randint(0, 50_000, (512,)).tolist()
    start, new = ids[:config.prompt_tokens], config.new_tokens
    ways = {}
    engines = {dtype: Engine(gpt, tokenizer, dtype) for dtype in PRECISIONS}
    for dtype, engine in engines.items():
        ways[f"ours {dtype}, 1 stream"] = lambda e=engine: decode(e, start, 1, new)
        ways[f"ours {dtype}, prompt of 512"] = lambda e=engine: prompt(e, ids)
    for dtype in "float32", "int8":
        for streams in 8, 32:
            ways[f"ours {dtype}, {count(streams)}"] = (
                lambda e=engines[dtype], n=streams: decode(e, start, n, config.crowd_tokens))
    with tempfile.TemporaryDirectory() as folder:
        if config.peers:
            import transformers  # noqa: PLC0415
            save_huggingface(folder, gpt, tokenizer, torch.float32)
            for dtype in PEER_PRECISIONS:
                theirs, name = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), dtype
                for streams in 1, 8:
                    ways[f"transformers {name}, {count(streams)}"] = (
                        lambda m=theirs, n=streams: transformers_decode(m, start, n, config.crowd_tokens))
            for dtype, name in LLAMA.items():
                save_gguf(Path(folder, f"{dtype}.gguf"), gpt, tokenizer, dtype)
                llama = Llama(Path(folder, f"{dtype}.gguf"))
                ways[f"{name}, 1 stream"] = lambda m=llama: m.decode(start, new)
                ways[f"{name}, prompt of 512"] = lambda m=llama: m.prompt(ids)
        for way in ways.values():
            way()  # the first time is slower
        rounds = [{name: way() for name, way in ways.items()} for _ in range(config.rounds)]
    for name in ways:
        values = [each[name] for each in rounds]
        print(f"{statistics.median(values):8.1f} tokens/s  {name:36} ({min(values):.1f} to {max(values):.1f})")
    for dtype in "int8", "float32":
        measured = [positions(engines[dtype], ids) for _ in range(max(1, config.rounds // 2))]
        for name in measured[0]:
            print(f"{statistics.median(each[name] for each in measured):8.1f} tokens/s  ours {dtype}, 1 stream, {name}")
    clear(engines["int8"])
    first = []
    for _ in range(2):
        began = time.perf_counter()
        next(iter(engines["int8"].submit(ids, max_new_tokens=1)))
        first.append(time.perf_counter() - began)
    print(f"first token of a 512-token prompt, int8: {first[0] * 1000:.0f} ms; again, from the cache: {first[1] * 1000:.0f} ms")

    def ratio(ours: str, theirs: list[str], wanted: float):
        if config.peers:
            values = [each[ours] / max(each[name] for name in theirs) for each in rounds]
            print(f"{statistics.median(values):6.2f} times ({min(values):.2f} to {max(values):.2f}), wanted {wanted}: "
                  f"{ours} against {' and '.join(theirs)}")

    ratio("ours float16, 1 stream", ["llama.cpp f16, 1 stream"], 1.1)
    ratio("ours int8, 1 stream", ["llama.cpp q8_0, 1 stream"], 1.0)
    ratio("ours float32, 1 stream", ["llama.cpp f32, 1 stream"], 0.85)
    ratio("ours int8, 8 streams", [f"transformers {dtype}, 8 streams" for dtype in PEER_PRECISIONS], 8)
    ratio("ours int8, 32 streams", ["ours int8, 8 streams"], 1)
    ratio("ours int8, prompt of 512", [f"{name}, prompt of 512" for name in LLAMA.values()], 1.5)


@torch.inference_mode()
def quality(config: Config):
    """Perplexity of a text, and how many of the float32 model's greedy tokens each precision chooses, given the same before."""
    gpt, tokenizer, info = load_model(config.quality)
    text = config.text.read_text(encoding="utf-8")
    text = text[-len(text) // 10:][:40_000]  # of what a model was trained on, its validation part
    ids = tokenizer.encode(text)
    windows = torch.tensor([ids[i:i + gpt.config.block_size] for i in range(0, len(ids) - gpt.config.block_size,
                                                                            gpt.config.block_size)])
    exact = None
    for dtype in "float32", "bfloat16", "float16", "int8":
        model = Engine(gpt, tokenizer, dtype).packed
        nats = perplexity(model, tokenizer, text)["nats_per_token"]
        logits = (model.logits(model.hidden(window[None]))[..., :tokenizer.vocab_size] for window in windows)
        greedy = torch.cat([rows.argmax(-1) for rows in logits])
        exact = exact or (nats, greedy)
        print(f"{info['name']}, {dtype}: perplexity {math.exp(nats):.4f} ({100 * math.expm1(nats - exact[0]):+.3f}%), "
              f"greedy tokens equal to float32's: {100 * (greedy == exact[1]).double().mean():.2f}%")


def main(config: Config):
    use_allowed_cores()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    if config.quality:
        quality(config)
    else:
        speeds(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
