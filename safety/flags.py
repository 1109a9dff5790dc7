"""Values of flags that are refused while the command line is read, before any model work."""

import argparse


def count(text: str) -> int:
    """A whole number of at least 1; an argparse `type`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, but it is {text!r}")
    return value
