"""The one exception meant for people: a single line that names the thing, the place and the remedy.

Entry points (train.py, evaluate.py, scripts/) print it without a traceback and exit with code 2.
"""


class UserError(Exception):
    """Bad input that the user can mend; the message is one line: what is wrong, where, what to do."""
