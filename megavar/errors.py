"""The one exception for bad input."""


class UserError(Exception):
    """Bad input, said in one line that names the thing and the fix. The command line prints it and exits with 2."""
