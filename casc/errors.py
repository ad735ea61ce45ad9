"""Errors that a user can mend; the command lines print them as one line."""


class UserError(ValueError):
    """Something in the input, the settings or the machine that the user can put right.

    The message names the file or flag, what is wrong with it, and what to do.
    """
