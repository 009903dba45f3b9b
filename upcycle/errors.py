"""The one kind of error that a user can mend.

Raise `UpcycleError` with a single line that names the input, says what is wrong with it and what to do.
The command line prints that line and exits with code 2; `--debug` shows the traceback.
"""


class UpcycleError(Exception):
    """Bad input: one line that names it, what is wrong and what to do."""
