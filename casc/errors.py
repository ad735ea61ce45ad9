"""Errors that a user can mend; the command lines print them as one line."""

from casc.printing import plain


class UserError(ValueError):
    """Something in the input, the settings or the machine that the user can put right.

    The message names the file or flag, what is wrong with it, and what to do. It is kept `plain`:
    names and answers in it come from anywhere.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        super().__init__(plain(message), *more)


class TransientError(UserError):
    """What may not happen a second time: a server that can't be reached, memory that ran out.

    A run that it ended goes on from its newest checkpoint.
    """
