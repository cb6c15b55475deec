"""Times several ways to do the same work, in alternating rounds.

Machines drift: within a round all ways run in the same conditions, so their ratios compare.
"""
import time
from collections.abc import Callable


def time_in_rounds(ways: dict[str, Callable], rounds: int, clock=time.perf_counter
                   ) -> dict[str, list[float]]:
    """Seconds that each way took in each round, after a round that only warms up."""
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = clock()
            way()
            if number > 0:
                times[name].append(clock() - began)
    return times
