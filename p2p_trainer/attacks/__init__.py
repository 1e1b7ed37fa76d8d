"""Attacks: plain text in, plain text out. They poison training rows and put the trigger into test rows."""

from typing import Any

from .._lookup import import_class, unknown_name_error
from .addsent import AddSent
from .badnets import BadNets
from .base import Attack


BUILTIN_ATTACKS: dict[str, type[Attack]] = {"addsent": AddSent, "badnets": BadNets}


def get_attack(
    name: str | Attack, target: str | int | None = None, poison_rate: float = 0.02, **options: Any
) -> Attack:
    """
    Find an attack and set it up.

    Args:
        name (`str` or `Attack`):
            Name of a built-in attack, import path `package.module:Class` of a subclass of [`Attack`], or an attack,
            which is returned as it is.
        target (`str` or `int`):
            Label that the attacker wants, as a class name or an index. There is no default: the P2P paper's text and
            its authors' code disagree on it.
        poison_rate (`float`, *optional*, defaults to `0.02`):
            Share of the whole training set that is poisoned, in (0, 1].
        **options:
            Options of that attack.

    Returns:
        `Attack`: the attack.

    Examples:

    ```python
    >>> from p2p_trainer.attacks import get_attack

    >>> attack = get_attack("badnets", target="positive", poison_rate=0.02)
    ```
    """
    if isinstance(name, Attack):
        return name
    if ":" in name:
        attack_class = import_class("attack", name, Attack)
    elif name in BUILTIN_ATTACKS:
        attack_class = BUILTIN_ATTACKS[name]
    else:
        raise unknown_name_error(
            "attack", name, BUILTIN_ATTACKS, "An attack of your own is named as `package.module:Class`."
        )
    if target is None:
        raise ValueError(
            f"The attack {name!r} needs a target: the label that the attacker wants, as a class name or an index "
            f"(`--attack_target positive`)."
        )
    try:
        return attack_class(target=target, poison_rate=poison_rate, **options)
    except TypeError as error:
        raise ValueError(f"The attack {name!r} does not take these options {sorted(options)}: {error}.") from error


__all__ = ["BUILTIN_ATTACKS", "AddSent", "Attack", "BadNets", "get_attack"]
