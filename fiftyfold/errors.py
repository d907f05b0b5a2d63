"""The one exception that fiftyfold raises on purpose, and how it quotes others."""


class FiftyfoldError(ValueError):
    """Something that a user can mend; the message names the thing and the way out.

    The command line prints the message alone and exits with status 1. What a message quotes may come from a hostile
    file and be of any length, so that a long one is cut in its middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= 1000 else f"{message[:700]} … {message[-290:]}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
