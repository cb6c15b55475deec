"""Reports a user's mistake as one sentence; only bugs end in a traceback.

Programs import this module before the slow ones, so that Ctrl-C is quiet from the start.
"""
import contextlib
import os
import sys
import time

MAX_MESSAGE = 600  # characters


class UserError(Exception):
    """An error that the user can fix.

    The message is one sentence that says what happened and what to do. Under torchrun only rank 0
    prints it; with `every_rank` each process prints its own, for errors that differ between ranks.
    """

    def __init__(self, message: str, every_rank: bool = False):
        self.every_rank = every_rank
        # the message may quote other programs or files: keep it to one line of limited length
        line = " ".join(message.split())
        if len(line) > MAX_MESSAGE:
            line = f"{line[:400]} … {line[-150:]}"
        super().__init__(line)


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
