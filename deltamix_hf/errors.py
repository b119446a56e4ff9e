"""The one error type users see.

Everything this package refuses (a wrong base, a budget that cannot be met, a damaged file) is
reported as `DeltaMixError`: one line that names what was wrong and what to do about it. It derives
from `ValueError` so that callers who already guard `from_pretrained` keep working.
"""

_LONGEST = 1500  # characters of a message


class DeltaMixError(ValueError):
    """Bad input: the message says what was wrong and what to do."""

    def __str__(self) -> str:  # not when made: compilers cannot trace an __init__ of an error
        return one_line(super().__str__())


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that explain at length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(message: str) -> str:
    """Return a message without what a terminal would obey, cut if it is long.

    Names in it may come from a hostile file: no line breaks, no terminal commands.
    """
    if not message.isprintable():
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return message
