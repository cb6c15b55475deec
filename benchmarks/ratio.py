"""The line in which a benchmark reports how it compares with a reference, and its parser.

    = int8, 8 streams: 9.85 times transformers in float32; 9.62 to 10.11

The median comes first, then the smallest and the largest ratio of all rounds. The label is the same
sentence without the number: `int8, 8 streams: times transformers in float32`.
"""
import re
import statistics
from collections.abc import Iterable


def print_ratio(subject: str, ratios: list[float], reference: str, note: str = ""):
    """Prints the line for one comparison; `reference` starts with "times" or "of"."""
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
    details = ", ".join(part for part in (spread, note) if part)
    line = sentence(f"{subject}: {reference}", statistics.median(ratios))
    print(f"= {line}" + (f"; {details}" if details else ""))


def divide(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """The ratio in each round."""
    return [a / b for a, b in zip(ours, theirs)]


def parse_ratio(line: str) -> tuple[str, float] | None:
    """(label, ratio) if the line reports a ratio."""
    match = re.fullmatch(r"= ([^:]+): ([\d.]+) ([^;]+?)(;.*)?", line.strip())
    return (f"{match[1]}: {match[3]}", float(match[2])) if match else None


def sentence(label: str, ratio: float, emphasis: str = "") -> str:
    """The label with its ratio in place, set between two `emphasis` marks."""
    return label.replace(": ", f": {emphasis}{ratio:.2f}{emphasis} ", 1)
