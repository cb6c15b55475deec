"""Runs a parser on many damaged inputs in this process, and watches its time and its memory.

An input is a number: random.Random(number) draws it. So a failure is reproduced by

    SOAK_INPUT=123456 python -m pytest -m soak -n 0 tests/soak/test_parsers.py -k NAME

The number of the present input is also in soak.input beside this file, for one that ends the
process: a crash of a library, or a hang that Python cannot interrupt.
"""
import contextlib
import faulthandler
import gc
import mmap
import os
import random
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from faults import Soak

from common.errors import UserError

CPU_S = 10  # an input that takes longer hangs: most take a millisecond
WALL_S = 900  # without any progress; the process may have the lowest priority
MEMORY_BYTES = 100 * 2**20  # an input that takes more is out of proportion: most have a few KB
ADDRESS_SPACE_BYTES = 4 * 2**30  # beyond what the process has at first, to protect the machine
CHECK_EVERY = 500  # inputs between two collections of garbage
MAX_FAILURES = 1000
CURRENT_INPUT = Path(__file__).parent / "soak.input"


class Hang(BaseException):
    """An input has taken CPU_S. Not an Exception, which a parser might catch."""


class Memory(BaseException):
    """An input has taken MEMORY_BYTES."""


def fuzz(name: str, attempt: Callable[[random.Random], str]):
    """Calls attempt(source) with one random source after another, until the time is over.

    `attempt` draws an input, gives it to a parser and returns the outcome. A UserError, or an
    OSError that names a file, is one sentence. Any other exception is a failure: equal ones are
    counted, and the first of each kind is printed with its number at the end.
    """
    if "SOAK_INPUT" in os.environ:  # reproduce a failure
        print(run(attempt, random.Random(int(os.environ["SOAK_INPUT"]))))
        return
    failures = {}  # (type, place) -> [times, number of the first input, its traceback]
    with Soak() as soak, watched(name) as enter:
        first = soak.random.getrandbits(40)
        for number, _ in enumerate(soak, first):
            enter(number)
            try:
                outcome = run(attempt, random.Random(number))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                text = "".join(traceback.format_exception(error))
                kind = type(error).__name__, place_of(error)
                failures.setdefault(kind, [0, number, text])[0] += 1
                outcome = "FAILED"
                assert sum(times for times, _, _ in failures.values()) < MAX_FAILURES, failures
            soak.count(f"damage in {name}", outcome)
    for times, number, text in failures.values():
        print(f"\n{times} times, first SOAK_INPUT={number}:\n{text}")
    assert not failures, list(failures)


def run(attempt, source: random.Random) -> str:
    """The outcome of one input. Raises Hang or Memory if it takes too much."""
    peak = peak_bytes()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        outcome = attempt(source)
    except UserError as error:
        assert str(error), "an empty sentence"
        outcome = "one sentence"
    except OSError as error:
        if not error.filename:  # a program would print a traceback
            raise
        outcome = "one sentence"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if peak_bytes() - peak > MEMORY_BYTES:
        raise Memory(f"{(peak_bytes() - peak) / 2**20:,.0f} MB")
    return outcome


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place_of(error: BaseException) -> str:
    """Where the error was raised: the last line of this project in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


@contextlib.contextmanager
def watched(name: str):
    """Guards a loop over inputs; yields a function to call with the number of each."""
    def on_hang(*_):
        raise Hang(f"more than {CPU_S} s of computing")

    count = 0

    def enter(number: int):
        nonlocal count
        current[:] = f"{name[:40]:<40}{number:>20}\n".encode("ascii", "replace")
        if count % CHECK_EVERY == 0:
            gc.collect()
            faulthandler.dump_traceback_later(WALL_S, exit=True)
        count += 1

    with open(CURRENT_INPUT, "w+b") as file, open(os.devnull, "w", errors="replace") as null:
        file.write(bytes(61))
        file.flush()
        previous = signal.signal(signal.SIGPROF, on_hang)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
        # collecting garbage after every few inputs would visit all that torch has imported
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            with (mmap.mmap(file.fileno(), 61) as current, warnings.catch_warnings(),
                  contextlib.redirect_stdout(null), contextlib.redirect_stderr(null)):
                warnings.simplefilter("ignore")  # pytest would keep them all
                resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
                yield enter
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGPROF, previous)
            gc.enable()
            gc.unfreeze()
