"""Exceptions that end a command, and one-line messages."""


class UserError(Exception):
    """A user error, in one line: the value, the rule and the way out. Exit status 2."""


class FailedError(Exception):
    """Any other failure that ends a command, in one line. Exit status 1."""


def exit_status(error: BaseException) -> int:
    """Exit status for `error`: 2 for a user error, 128 + signal for a signal, 1 for all else."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else 2)
    return 2 if isinstance(error, UserError) else 1


def reason(error: Exception) -> str:
    """The message of another library's error, in one line of at most 180 characters.

    Of a longer one both ends, since long paths hide what happened to them.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 180 else f"{said[:80]} … {said[-97:]}"


def printable(text: str) -> str:
    """Text from files and archives, made safe to print on one line of a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shortened(text: str, most: int) -> str:
    """Printable text of at most `most` characters."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"
