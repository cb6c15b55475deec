"""What train.py's step does in a second, against what a person would run instead, in one session.

    git clone https://github.com/karpathy/build-nanogpt
    python -m benchmarks.train_throughput build-nanogpt/ --sequences 2 --dtype float32                # two CPU cores, 15 min
    python -m benchmarks.train_throughput build-nanogpt/ nanoGPT/ --sequences 64 --dtype bfloat16 --device cuda

A step is forward, backward, clipping and AdamW over one micro-batch of random tokens. Ours is `train.update` itself; of
a checkout only the model's classes are run (build-nanogpt's train_gpt2.py, nanoGPT's model.py), with fused AdamW; transformers'
GPT2LMHeadModel likewise. Each way lives in a process of its own, so that its peak memory is its own, and every round lets
each take its steps in turn: a drifting machine drifts for all. Medians of the rounds, and the ratios within rounds.
"""
import ast
import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

import ddp
import train
from common.devices import find_device
from model import SIZES
from training import optim, setup
from training.presets import PRESETS


@dataclasses.dataclass
class Options:
    checkouts: tyro.conf.Positional[list[Path]] = dataclasses.field(default_factory=list)
    """Folders of build-nanogpt or nanoGPT."""
    size: str = "gpt2"
    sequences: int = 2
    """Of the micro-batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    rounds: int = 3
    steps: int = 1
    """In a round."""
    eager: bool = True
    """Time the ways without torch.compile too."""
    profile: bool = False
    """Print where the time of our compiled step goes."""


def our_step(options: Options, device: torch.device, compiled: bool):
    c = SIZES[options.size]
    config = dataclasses.replace(
        PRESETS["gpt2-124m"], n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, dtype=options.dtype,
        batch_tokens=options.sequences * c.block_size, micro_batch=options.sequences, compile="on" if compiled else "off")
    world = ddp.World(0, 1, device)
    with torch.device("meta"):
        model = train.GPT(setup.sizes_of(config, 50_304))
    setup.place(model, None, config, world)
    optimizers = optim.build_optimizers(model, "adamw", 0.1, (0.9, 0.95))
    trained = train.Trained(config, world, Path(), None, model, model, None, optimizers)
    return lambda x, y, step: train.update(trained, x, y, step)[0].item()


def their_step(options: Options, device: torch.device, compiled: bool, build):
    """A step around another model: build() -> it, and a function (model, x, y) -> loss."""
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    model, loss_of = build(options)
    model.to(device)
    fast = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)

    def take(x, y, _):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = loss_of(fast, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return take


def checkout_model(folder: Path, options: Options):
    path = next(folder / name for name in ("train_gpt2.py", "model.py") if (folder / name).exists())
    tree = ast.parse(path.read_text())  # the classes and what they need, not the script around them
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
                 or (isinstance(node, ast.Import | ast.ImportFrom) and "hellaswag" not in ast.unparse(node))]
    module = {"__name__": path.stem}
    sys.modules[path.stem] = type(sys)(path.stem)  # where dataclasses look their module up
    exec(compile(tree, path, "exec"), module)
    c = SIZES[options.size]
    known = {"vocab_size": 50_304, "dropout": 0.0, "bias": True, **{name: getattr(c, name) for name in (
        "block_size", "n_layer", "n_head", "n_embd")}}
    fields = {field.name for field in dataclasses.fields(module["GPTConfig"])}
    config = module["GPTConfig"](**{name: value for name, value in known.items() if name in fields})
    return module["GPT"](config), lambda model, x, y: model(x, y)[1]


def transformers_model(options: Options):
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (a way alone needs it)
    c = SIZES[options.size]
    config = GPT2Config(vocab_size=50_304, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    # it shifts labels itself: the last position, which it leaves out, is one of a thousand
    return GPT2LMHeadModel(config).train(), lambda model, x, y: model(input_ids=x, labels=x).loss


def work(name: str, compiled: bool, options: Options, pipe):
    """A process of one way: takes as many steps as it is told, and answers (seconds, peak bytes, loss)."""
    device = ddp.pick_device(options.device)
    torch.manual_seed(0)
    if name == "ours":
        take = our_step(options, device, compiled)
    elif name == "transformers":
        take = their_step(options, device, compiled, transformers_model)
    else:
        take = their_step(options, device, compiled, lambda options: checkout_model(Path(name), options))
    tokens = torch.randint(50_257, (options.sequences, SIZES[options.size].block_size + 1), device=device)
    x, y, step = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 0  # some take them as views
    while steps := pipe.recv():
        if steps == "profile":
            with torch.profiler.profile() as profile:
                take(x, y, step)
            print(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25))
            continue
        began = time.perf_counter()
        for _ in range(steps):
            loss = take(x, y, step)
            step += 1
        seconds = time.perf_counter() - began
        peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        pipe.send((seconds, peak, loss))


def main(options: Options):
    device = ddp.pick_device(options.device)
    names = ["ours", *map(str, options.checkouts), "transformers"]
    ways = [(name, compiled) for name in names for compiled in ((True, False) if options.eager else (True,))]
    context, pipes = multiprocessing.get_context("spawn"), {}
    for way in ways:
        pipes[way], theirs = context.Pipe()
        context.Process(target=work, args=(*way, options, theirs), daemon=True).start()
    times, peaks, losses = {way: [] for way in ways}, {}, {}
    for round in range(options.rounds + 1):  # the first compiles and warms up
        for way in ways:
            pipes[way].send(options.steps)
            seconds, peaks[way], losses[way] = pipes[way].recv()
            if round:
                times[way].append(seconds / options.steps)
    c = SIZES[options.size]
    tokens = options.sequences * c.block_size
    with torch.device("meta"):
        flops = train.GPT(dataclasses.replace(c, vocab_size=50_304)).flops_per_token(c.block_size)
    sheet = find_device(ddp.device_name(device))
    print(f"torch {torch.__version__}, {ddp.device_name(device)}, {options.dtype}, {options.size}, {options.sequences} x "
          f"{c.block_size} tokens a step; {flops / 1e9:.3f} GFLOP a token")
    for way, taken in times.items():
        ratios = sorted(other / ours for other, ours in zip(taken, times["ours", True]))
        speed = tokens / statistics.median(taken)
        mfu = f", MFU {speed * flops / sheet.flops:.1%}" if sheet else ""
        print(f"{way[0]:>30} {'compiled' if way[1] else 'eager':8} {speed:10,.1f} tokens/s, {speed * flops / 1e9:8,.0f} GFLOP/s"
              f"{mfu}, peak {peaks[way] / 1e9:6.2f} GB, loss {losses[way]:.3f}")
        if way != ("ours", True):
            print(f"= {statistics.median(ratios):.2f} a training step, compiled, against {Path(way[0]).name} "
                  f"{'compiled' if way[1] else 'eager'}; {ratios[0]:.2f} to {ratios[-1]:.2f}")
    print(json.dumps({f"{name}, {'compiled' if compiled else 'eager'}": taken for (name, compiled), taken in times.items()}))
    if options.profile:
        pipes["ours", True].send("profile")
    for pipe in pipes.values():
        pipe.send(0)
    while options.profile and multiprocessing.active_children():
        time.sleep(0.1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
