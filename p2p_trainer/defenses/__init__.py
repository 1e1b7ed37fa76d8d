"""Defenses: P2P, its rivals, and controls, behind one interface."""

from .base import Compute, Defense
from .registry import BUILTIN_DEFENSES, get_defense, load_defense
from .workbench import Workbench


__all__ = ["BUILTIN_DEFENSES", "Compute", "Defense", "Workbench", "get_defense", "load_defense"]
