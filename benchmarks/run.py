"""Run every benchmark that this machine can run, and compare the ratios with earlier ones.

    pip install -r requirements-interop.txt         # transformers and llama.cpp
    python -m benchmarks.run                        # the benchmarks that need no further files
    python -m benchmarks.run decode hellaswag_speed --build-nanogpt build-nanogpt/ \
        --hellaswag hellaswag_val.jsonl             # only these two

A benchmark prints one line for each comparison with a reference (see ratio.py). This program stores
the ratios in results/<machine>.json and in the table of benchmarks/README.md. If a ratio is more
than 10% below the stored one, the program reports it and exits with code 1. Run nothing else
on the machine meanwhile.
"""
import dataclasses
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from benchmarks.pages import write_lines
from benchmarks.ratio import parse_ratio, sentence
from common.devices import allowed_cores
from common.files import read_json, write_json

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # name: arguments; {field} stands for a field of Config
    "decode": [],
    "train_throughput":
        ["{build_nanogpt}", "--sequences", "2", "--dtype", "float32", "--rounds", "3"],
    "hellaswag_speed": ["{hellaswag}", "{build_nanogpt}"],
    "shakespeare_time": ["{nanogpt}", "{shakespeare}"],
    "tokenizing": ["{corpus}"],
    "loss_in_chunks": [],
    "train_step_cpu": [],
}
TOLERANCE = 0.9  # a ratio below this share of the stored one is reported


@dataclasses.dataclass
class Config:
    """Benchmarks to run, and the files that some of them need."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run only these benchmarks."""
    build_nanogpt: Path | None = None
    """A checkout of karpathy/build-nanogpt."""
    nanogpt: Path | None = None
    """A checkout of karpathy/nanoGPT."""
    hellaswag: Path | None = None
    """HellaSwag's validation examples."""
    corpus: Path | None = None
    """Text to tokenize, at least 200 MB."""
    shakespeare: Path | None = None
    """tiny_shakespeare.txt."""


def main(config: Config) -> int:
    path = ROOT / "benchmarks" / "results" / f"{machine()}.json"
    results = read_json(path).get("ratios", {})
    regressions = []
    for name in config.names or PROGRAMS:
        # skip a benchmark whose files were not given
        fields = re.findall(r"{(\w+)}", " ".join(PROGRAMS[name]))
        missing = [f"--{field.replace('_', '-')}" for field in fields
                   if getattr(config, field) is None]
        if missing:
            print(f"{name}: skipped, needs {' and '.join(missing)}")
            continue

        # run it, and compare with the stored ratios
        values = dataclasses.asdict(config)
        ratios = run(name, [argument.format_map(values) for argument in PROGRAMS[name]])
        if not ratios:
            regressions.append(f"{name} failed")
            continue
        stored = results.get(name, {})
        for label, ratio in ratios.items():
            if label in stored and ratio < TOLERANCE * stored[label]:
                regressions.append(f"{name}: {sentence(label, ratio)} (was {stored[label]:.2f})")

        # store the new ones
        results[name] = ratios
        path.parent.mkdir(exist_ok=True)
        write_json(path, {
            "machine": machine(), "cores": allowed_cores(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "ratios": results})
        write_table(path, results)
    print()
    for line in regressions:
        print(f"worse than before: {line}")
    return int(bool(regressions))


def run(name: str, arguments: list[str]) -> dict[str, float]:
    """The ratios that a benchmark prints, by label; {} if it fails."""
    print(f"\n{name} {' '.join(arguments)}", flush=True)
    ratios = {}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if parsed := parse_ratio(line):
                label, ratios[label] = parsed
    if process.returncode:
        print(f"{name}: failed with exit code {process.returncode}")
        return {}
    return ratios


def machine() -> str:
    """The names of the CPU and the GPU, in characters that suit a file name."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name += f" {torch.cuda.get_device_name()}"
    return re.sub(r"\W+", "-", name).strip("-").lower()


def write_table(path: Path, results: dict[str, dict[str, float]]):
    """Writes the table of ratios in benchmarks/README.md."""
    lines = [f"| speed on `{path.stem}` | benchmark |", "| --- | --- |"]
    for name, ratios in results.items():
        for label, ratio in ratios.items():
            lines.append(f"| {sentence(label, ratio, emphasis='**')} | `{name}` |")
    write_lines(ROOT / "benchmarks" / "README.md", "ratios", lines)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
