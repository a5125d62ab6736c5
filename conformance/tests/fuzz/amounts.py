"""How much the programs of this folder do."""

import argparse


def amount(text):
    """Return a count, an int, or a time in seconds, a float, from text such as "10000" or "600s"."""
    try:
        return float(text[:-1]) if text.endswith("s") else int(text)
    except ValueError:
        message = f"must be a count or a time such as 600s. Got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
