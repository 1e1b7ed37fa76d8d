"""P2P behind the interface of its rivals, and no defense at all."""

from ..config import P2PConfig
from ..tasks import Task
from .base import Defense


def refuse_generation(name: str, task: Task) -> None:
    """Refuse a task without classes, for controls that are about labels or answer cues."""
    if not task.num_labels:
        raise ValueError(
            f"Task {task.name!r} has no classes: {name} is about labels. Use `p2p_auto`, `p2p`, `mb_defense`, `none`, "
            f"or a defense that changes inputs."
        )


class NoDefense(Defense):
    """Plain fine-tuning on the rows as they are."""

    name = "none"
    images = True


class P2P(Defense):
    """P2P as the paper's text defines it: S drawn at random, and nothing written into keyed rows."""

    name = "p2p"
    images = True

    def configure(self, args: P2PConfig) -> None:
        args.p2p_enabled, args.p2p_reserve, args.p2p_immunize = True, "random", "none"


class P2PAuto(Defense):
    """P2P with this package's defaults: S from rows that nothing speaks against, suspected triggers contradicted."""

    name = "p2p_auto"
    images = True

    def configure(self, args: P2PConfig) -> None:
        args.p2p_enabled, args.p2p_reserve, args.p2p_immunize = True, "auto", "auto"


class Configured(Defense):
    """
    Whatever the `p2p_` settings say; no defense to be named, but what runs where none is.

    Args:
        enabled (`bool`):
            Whether they say that there is a defense.
    """

    name = "configured"
    images = True

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def configure(self, args: P2PConfig) -> None:
        pass
