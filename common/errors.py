"""UserError: a mistake that the user can fix, reported in one sentence instead of a traceback."""
from collections.abc import Callable

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


def check_range(options, requirement: str, is_met: Callable[[float], bool], *names: str):
    """Raises UserError if one of the options with these names does not meet the requirement.

    For example, check_range(config, "at least 1", lambda x: x >= 1, "limit") says "--limit must be
    at least 1, not 0." An option that is None or "auto" counts as left out.
    """
    for name in names:
        value = getattr(options, name)
        if value not in (None, "auto") and not is_met(value):
            raise UserError(f"--{name.replace('_', '-')} must be {requirement}, not {value}.")
