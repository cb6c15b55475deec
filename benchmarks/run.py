"""Every benchmark that this machine can run, side by side with the peers that are there; what came of it is kept.

    pip install -r requirements-interop.txt                   # transformers and llama.cpp
    python -m benchmarks.run                                  # what needs nothing else
    python -m benchmarks.run decode --build-nanogpt build-nanogpt/ --nanogpt nanoGPT/ --hellaswag hellaswag_val.jsonl \
        --corpus corpus.jsonl.zst --shakespeare tiny_shakespeare.txt

A benchmark prints `= RATIO WHAT` for each way of ours against a peer: how many times as fast, in one run. They go to
results/<machine>.json and into README's table. A ratio that fell by more than a tenth since it was kept is named, and the
exit code is then 1. Let nothing else run meanwhile.
"""
import dataclasses
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from common.files import read_json, write_json

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # and their arguments, where {name} is one of Config's
    "decode": [],
    "train_throughput": ["{build_nanogpt}", "--sequences", "2", "--dtype", "float32", "--rounds", "3"],
    "hellaswag_speed": ["{hellaswag}", "{build_nanogpt}"],
    "shakespeare_time": ["{nanogpt}", "{shakespeare}"],
    "tokenize": ["{corpus}"],
    "loss_in_chunks": [],
    "train_step_cpu": [],
}
WORSE = 0.9  # of what was kept


@dataclasses.dataclass
class Config:
    """Measures."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these benchmarks."""
    build_nanogpt: Path | None = None
    """A checkout of karpathy/build-nanogpt."""
    nanogpt: Path | None = None
    """A checkout of karpathy/nanoGPT."""
    hellaswag: Path | None = None
    """HellaSwag's validation examples."""
    corpus: Path | None = None
    """Text to tokenize, 200 MB or more."""
    shakespeare: Path | None = None
    """tiny_shakespeare.txt."""


def main(config: Config):
    path = ROOT / "benchmarks" / "results" / f"{machine()}.json"
    kept = read_json(path)
    results, worse = kept.get("ratios", {}), []
    for name in config.names or PROGRAMS:
        missing = [f"--{field.replace('_', '-')}" for field in re.findall(r"{(\w+)}", " ".join(PROGRAMS[name]))
                   if getattr(config, field) is None]
        if missing:
            print(f"{name}: skipped, as it needs {' and '.join(missing)}")
            continue
        ratios = run(name, [argument.format_map(dataclasses.asdict(config)) for argument in PROGRAMS[name]])
        worse += [f"{name} failed"] * (not ratios)
        worse += [f"{name}: {what} is {now:.2f}, and was {before:.2f}" for what, now in ratios.items()
                  if now < WORSE * (before := results.get(name, {}).get(what, 0))]
        results[name] = ratios or results.get(name, {})
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"machine": machine(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
                          "date": time.strftime("%Y-%m-%d"), "ratios": results})
        write_table(path, results)
    print("\n".join(["", *(f"worse than before: {line}" for line in worse)]))
    return int(bool(worse))


def run(name: str, arguments: list[str]) -> dict[str, float]:
    """What a benchmark printed as `= RATIO WHAT; …`; nothing where it failed."""
    print(f"\n{name} {' '.join(arguments)}", flush=True)
    lines, command = [], [sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        print(f"{name}: failed with exit code {process.returncode}")
        return {}
    found = (re.fullmatch(r"= ([\d.]+) ([^;]+?)(;.*)?", line.strip()) for line in lines)
    return {match[2]: float(match[1]) for match in found if match}


def machine() -> str:
    """The processor's name, fit for a file."""
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    gpu = f" {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return re.sub(r"\W+", "-", f"{models[0] if models else platform.processor() or platform.machine()}{gpu}").strip("-").lower()


def write_table(path: Path, results: dict[str, dict[str, float]]):
    """README's table, between its two marks."""
    readme = ROOT / "README.md"
    rows = [f"| {what} | {ratio:.2f} | `benchmarks/{name}.py` |"
            for name, ratios in results.items() for what, ratio in ratios.items()]
    table = "\n".join([f"| times as fast, on `{path.stem}` | | by |", "| --- | --- | --- |", *rows])
    text = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub(r"(<!-- ratios -->\n).*?(<!-- /ratios -->)", lambda marks: f"{marks[1]}{table}\n{marks[2]}", text,
                             flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
