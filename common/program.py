"""Reports a user's mistake in one sentence, and Ctrl-C in one word, instead of a traceback.

Programs import this module before the slow ones, so that Ctrl-C is quiet from the start.
"""
import contextlib
import os
import sys
import time

from common.errors import UserError


@contextlib.contextmanager
def report_user_errors(every_rank: bool = False):
    """Prints errors that the user can fix as `error: …` on stderr and exits with code 2.

    These are a `UserError` and an OSError that names a file. Ctrl-C exits with 130, a closed pipe
    with 141. Under torchrun only rank 0 prints, or every rank if `every_rank` is set. Prints `?`
    for characters that the output's encoding lacks, such as Cyrillic in a Windows pipe.
    """
    sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # for example `python generate.py … | head -1`
        # Python flushes stdout once more at exit: that must not fail on the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if not error.filename:
                raise
            error = UserError(f"{error.filename}: {error.strerror}.")
        if every_rank or error.every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(10)  # torchrun ends all ranks once one exits, and rank 0 must print first
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def hide_interrupt(kind, error, traceback):
    """Replaces the traceback of a Ctrl-C during imports with one word. For sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = hide_interrupt
