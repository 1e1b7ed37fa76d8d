"""The loss of MB-Defense's second stage, as a function of log-probabilities."""

import torch
from torch.nn.functional import logsigmoid


# "log_ratio": the difference of the log-probabilities goes into the sigmoid; "ratio": their ratio, as printed.
RATIOS = ("log_ratio", "ratio")

# exp(20) is in the flat end of the sigmoid already, and far from where float32 overflows (88).
_MAX_LOG = 20.0


def check_ratio(ratio: str, length_normalised: bool) -> None:
    """
    Check how answer and phrase are compared.

    Args:
        ratio (`str`):
            `"log_ratio"` or `"ratio"`.
        length_normalised (`bool`):
            Whether log-probabilities are means over tokens.
    """
    if ratio not in RATIOS:
        raise ValueError(f"`ratio` is one of {', '.join(RATIOS)}, got {ratio!r}.")
    if not isinstance(length_normalised, bool):
        raise ValueError(f"`length_normalised` is true or false, got {length_normalised!r}.")
    if ratio == "ratio" and length_normalised:
        raise ValueError(
            "`length_normalised: true` goes with `ratio: log_ratio`; `ratio: ratio` is the paper's formula, which has "
            "the probabilities of whole answers. Change one of the two."
        )


def mb_loss(
    logp_clean_mean: torch.Tensor,
    logp_clean_given_trigger: torch.Tensor,
    logp_phrase: torch.Tensor,
    lam: float = 1.0,
    ratio: str = "log_ratio",
) -> torch.Tensor:
    """
    Loss of MB-Defense's second stage (Kim & Lee, ACL 2026): `CE(y|x) - lam * log sigmoid(g)`.

    The paper prints `g = pi(y|x_d) / pi(y_d|x_d)`, a ratio of probabilities of whole answers. It is `"ratio"` here,
    and numerically poor: after stage 1, y is tens of nats less likely than y_d, so `g`, which is a factor of the
    gradient, is zero in float32 just where something has to be learnt; and as `g > 0`, the second term can't exceed
    `lam * log 2`. `"log_ratio"`, the default, puts the logarithm of that ratio into the sigmoid, as DPO does: its
    gradient is greatest where the phrase is preferred.

    Args:
        logp_clean_mean (`torch.Tensor` of shape `(examples,)`):
            Mean log-probability of a token of y after the clean prompt x.
        logp_clean_given_trigger (`torch.Tensor` of shape `(examples,)`):
            Log-probability of y after the prompt with trigger x_d, summed over its tokens (or the mean over them).
        logp_phrase (`torch.Tensor` of shape `(examples,)`):
            The same of the phrase y_d after x_d.
        lam (`float`, *optional*, defaults to `1.0`):
            Weight of the second term.
        ratio (`str`, *optional*, defaults to `"log_ratio"`):
            `"log_ratio"` or `"ratio"`.

    Returns:
        `torch.Tensor` of shape `(examples,)`: the loss of each example.
    """
    preference = logp_clean_given_trigger - logp_phrase
    if ratio == "ratio":
        preference = preference.clamp(max=_MAX_LOG).exp()
    return -logp_clean_mean - lam * logsigmoid(preference)
