"""Cuts texts that are too long."""

from collections.abc import Callable


def longest_start(text: str, fits: Callable[[str], bool]) -> str:
    """
    Find the longest beginning of a text that fits.

    By halving, not in proportion to what is too much: where the end of a text has more tokens to a letter than its
    beginning, as digits, Chinese or emoji behind English have, a proportion would take far more than needed, and
    whoever writes such an end would decide it.

    Args:
        text (`str`):
            A text that does not fit.
        fits (`Callable[[str], bool]`):
            Whether a beginning fits; one that does should still fit when it loses its end.

    Returns:
        `str`: the beginning, without white space at its end; empty if nothing fits.
    """
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle].rstrip()) else (low, middle)
    return text[:low].rstrip()
