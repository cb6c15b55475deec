"""UserError: a mistake of the user, told in one sentence. Only bugs end in a traceback."""

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
