"""What every command line here shares: a person's mistake ends in one sentence, a bug in a traceback."""
import contextlib
import os
import sys


class UserError(Exception):
    """Something a person can cause and mend; its message is one sentence: what happened and what to do. `every_rank` has each of
    torchrun's processes say it, where it is not the same for all."""

    def __init__(self, message: str, every_rank: bool = False):
        self.every_rank = every_rank
        line = " ".join(message.split())  # it may quote what other programs or files say, at any length
        super().__init__(line if len(line) <= 600 else f"{line[:400]} … {line[-150:]}")


@contextlib.contextmanager
def report_user_errors(every_rank: bool = False):
    """Turns a `UserError`, or a file that the system refuses, into `error: …` on stderr and exit code 2; Ctrl-C into
    130, a closed pipe into 141. Of torchrun's processes the first speaks for all, or each for itself with `every_rank`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # say, `python generate.py … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if not error.filename:
                raise
            error = UserError(f"{error.filename}: {error.strerror}.")
        if every_rank or error.every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
