"""The one error that is the user's to mend."""


class InputError(ValueError):
    """A setting, file or image is wrong. The message is one line: what is wrong, and what to do about it.

    Scripts print it without a traceback and exit with code 2 (see ``utils.console.command``); anything else that is
    raised is a fault of ours and keeps its traceback.
    """


def one_line(error: Exception) -> str:
    """What another library's error says, for a place in a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__
