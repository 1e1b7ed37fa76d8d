"""Attacks by name."""

from typing import Any

from .._lookup import import_class, unknown_name_error
from .base import Attack


# Imported when asked for: some of them need torch.
BUILTIN_ATTACKS = {
    "badnets": "badnets:BadNets",
    "addsent": "addsent:AddSent",
    "synattack": "synattack:SynAttack",
    "proattack": "proattack:ProAttack",
    "cbaattack": "cbaattack:CbaAttack",
    "mtbaattack": "mtbaattack:MtbaAttack",
    "lws": "lws:LWS",
    "knows_key": "adaptive:KnowsKey",
    "poisons_reserve": "adaptive:PoisonsReserve",
    "suffix_injection": "adaptive:SuffixInjection",
    "key_overlap": "adaptive:KeyOverlap",
    "poisoned_set": "poisoned_set:PoisonedSet",
}


def get_attack(
    name: str | Attack, target: str | int | None = None, poison_rate: float | None = None, **options: Any
) -> Attack:
    """
    Find an attack and set it up.

    Args:
        name (`str` or `Attack`):
            Name of a built-in attack (`badnets`, or as papers write it, `BadNets`), import path
            `package.module:Class` of a subclass of [`Attack`], or an attack, which is returned as it is.
        target (`str` or `int`):
            What the attacker wants: a label, as a class name or an index, or the payload of a generation task. There
            is no default: the P2P paper's text and its authors' code disagree on it.
        poison_rate (`float`, *optional*):
            Share of the whole training set that is poisoned, in (0, 1]. By default the attack's own.
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
    elif name.lower() in BUILTIN_ATTACKS:
        attack_class = import_class("attack", f"{__package__}.{BUILTIN_ATTACKS[name.lower()]}", Attack)
    else:
        raise unknown_name_error(
            "attack", name, BUILTIN_ATTACKS, "An attack of your own is named as `package.module:Class`."
        )
    if target is None:
        raise ValueError(
            f"The attack {name!r} needs a target: the label that the attacker wants, as a class name or an index "
            f"(`--attack_target positive`)."
        )
    if poison_rate is not None:
        options["poison_rate"] = poison_rate
    try:
        return attack_class(target=target, **options)
    except TypeError as error:
        raise ValueError(f"The attack {name!r} does not take these options {sorted(options)}: {error}.") from error
