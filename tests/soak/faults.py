"""What the soak tests share: a budget of time, and a table of the faults that were tried.

    python -m pytest -m soak -n 0                       # a minute per test
    SOAK_MINUTES=60 python -m pytest -m soak -n 0       # an hour per test
    python tests/soak/faults.py                         # the table of all sessions so far

Every test draws new random faults, and adds to soak.jsonl how many it tried. So sessions add up.
"""
import collections
import json
import os
import random
import time
from pathlib import Path

LOG = Path(__file__).parent / "soak.jsonl"
SECONDS = 60 * float(os.environ.get("SOAK_MINUTES", "1"))


class Soak:
    """Counts the faults that a test tries within its time, and writes them down at the end.

        with Soak() as soak:
            for _ in soak:          # until the time is over
                soak.count("SIGKILL", "the run resumed")
    """

    def __init__(self):
        self.seed = random.SystemRandom().getrandbits(32)
        self.random = random.Random(self.seed)
        self.counts = collections.Counter()  # of (fault, outcome)

    def __enter__(self):
        self.ends = time.monotonic() + SECONDS
        return self

    def __iter__(self):
        while time.monotonic() < self.ends:
            yield

    def count(self, fault: str, outcome: str, times: int = 1):
        self.counts[fault, outcome] += times

    def __exit__(self, kind, error, _):
        if error:
            error.add_note(f"seed {self.seed}, after {dict(self.counts)}")
            self.count("a test of this table", "FAILED")
        with open(LOG, "a") as file:
            for (fault, outcome), times in self.counts.items():
                file.write(json.dumps({"fault": fault, "outcome": outcome, "times": times}) + "\n")
        print(table(self.counts))


def table(counts: collections.Counter) -> str:
    """The faults, the times each was tried and the outcomes, as a table in Markdown."""
    lines = ["| fault | times | outcome |", "| --- | --- | --- |"]
    lines += [f"| {fault} | {times:,} | {outcome} |"
              for (fault, outcome), times in sorted(counts.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    total = collections.Counter()
    for line in map(json.loads, LOG.read_text().splitlines()):
        total[line["fault"], line["outcome"]] += line["times"]
    print(table(total))
