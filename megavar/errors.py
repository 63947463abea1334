"""The one exception for bad input."""


class UserError(Exception):
    """Bad input, said in one line that names the thing and the fix. The command line prints it and exits with 2."""


def in_one_line(error: BaseException) -> str:
    """What another library's error says."""
    return " ".join(str(error).split())
