"""What every command line here shares: a person's mistake ends in one sentence, a bug in a traceback."""
import contextlib
import sys


class UserError(Exception):
    """Something a person can cause and mend; its message is one sentence: what happened and what to do."""


@contextlib.contextmanager
def one_sentence():
    """Turns a `UserError` into `error: …` on stderr and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
