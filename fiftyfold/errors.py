"""The one exception that fiftyfold raises on purpose."""


class FiftyfoldError(ValueError):
    """Something that a user can mend; the message names the thing and the way out.

    The command line prints the message alone and exits with status 1.
    """
