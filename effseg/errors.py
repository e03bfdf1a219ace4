"""The one exception that means "your input is wrong, not the library"."""


class InputError(ValueError):
    """Bad input from a person: a file, a key or a value that cannot be used.

    The message is one line that names the file, the key or the value and says what was expected.
    The command line prints it and exits with code 2; everything else is a bug and keeps its
    traceback.
    """
