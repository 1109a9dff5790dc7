"""Values of flags that are refused while the command line is read, before any model work."""

import argparse
import sys


def count(text: str) -> int:
    """A whole number of at least 1; an argparse `type`."""
    return _whole(text, 1, sys.maxsize)


def seed(text: str) -> int:
    """What NumPy, scikit-learn and PyTorch all take as a seed; an argparse `type`."""
    return _whole(text, 0, 2**31 - 1)


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        most = f" and at most {high}" if high < sys.maxsize else ""
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least {low}{most}, but it is {text!r}")
    return value
