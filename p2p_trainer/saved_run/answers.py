"""What a saved run answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Classification:
    """
    Answer to one text.

    Parameters:
        label (`str` or `None`):
            Class name; `None` if the answer is withheld.
        index (`int`):
            Its index, -1 if the answer is withheld.
        score (`float`):
            Probability of the likeliest class.
        scores (`dict[str, float]`):
            Probability of each class; they sum to 1.
    """

    label: str | None
    index: int
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Response:
    """
    Written answer to one prompt.

    Parameters:
        text (`str` or `None`):
            The answer, without the prefix p that it began with; `None` if it is withheld.
        prefixed (`bool`):
            Whether it began with p, as every answer of a defended model should; `True` where none is expected. An
            answer without it came some other way than the one that was defended: do not trust it.
    """

    text: str | None
    prefixed: bool
