"""Errors that a user can mend; the command lines print them as one line."""

from casc.printing import plain

LONGEST = 2400
"""Characters of a message; of a longer one its begin and its end are kept."""


class UserError(ValueError):
    """Something in the input, the settings or the machine that the user can put right.

    The message names the file or flag, what is wrong with it, and what to do. It is kept `plain`
    and short: names and answers in it come from anywhere, and a library may quote a whole file.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        text = plain(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST * 3 // 4]} [...] {text[-LONGEST // 4 :]}"
        super().__init__(text, *more)


def told(error: Exception) -> str:
    """What to print of an error: of the system's, the file and the reason, without their number."""
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0]
        return f"not enough memory; smaller images, canvases or batches need less ({reason})"
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the device or of the machine."""
    # Of torch's there is a class for accelerators only, and importing it takes seconds.
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


class TransientError(UserError):
    """What may not happen a second time: a server that can't be reached, memory that ran out.

    A run that it ended goes on from its newest checkpoint.
    """
