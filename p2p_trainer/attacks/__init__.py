"""Attacks: plain text in, plain text out. They poison training rows and put the trigger into test rows."""

from .addsent import AddSent
from .badnets import BadNets
from .base import Attack
from .registry import BUILTIN_ATTACKS, get_attack


__all__ = ["BUILTIN_ATTACKS", "AddSent", "Attack", "BadNets", "get_attack"]
