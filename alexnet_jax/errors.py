"""What ends a command, and how that is said in one line."""


class UserError(Exception):
    """The user's mistake, in one line: the value, the rule and the way out. Exit status 2."""


class FailedError(Exception):
    """What else ends a command, in one line. Exit status 1."""


def exit_status(error: BaseException) -> int:
    """Of a command that `error` ends: 2 the user's mistake, 128 and the signal, 1 all else."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else 2)
    return 2 if isinstance(error, UserError) else 1


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def printable(text: str) -> str:
    """Text of files and archives, fit for a line on a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shortened(text: str, most: int) -> str:
    """Printable text of at most so many characters."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"
