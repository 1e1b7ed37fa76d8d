"""Defenses: P2P, its rivals, and controls, behind one interface."""

from .base import Compute, Defense
from .mb_trainer import MBDefenseConfig, MBDefenseTrainer
from .registry import BUILTIN_DEFENSES, get_defense, load_defense
from .workbench import Workbench


__all__ = [
    "BUILTIN_DEFENSES",
    "Compute",
    "Defense",
    "MBDefenseConfig",
    "MBDefenseTrainer",
    "Workbench",
    "get_defense",
    "load_defense",
]
