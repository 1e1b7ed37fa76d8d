"""Defenses by name, and those of saved runs."""

import json
from pathlib import Path
from typing import Any

from .._lookup import import_class, unknown_name_error
from ..evaluation import GUARD_NAME
from .base import DEFENSE_SCHEMA_VERSION, Defense


# Imported when asked for.
BUILTIN_DEFENSES = {
    "none": "p2p:NoDefense",
    "p2p": "p2p:P2P",
    "p2p_auto": "p2p:P2PAuto",
    "onion": "onion:Onion",
    "back_tr": "back_translation:BackTranslation",
    "scpd": "scpd:SCPD",
    "bki": "bki:BKI",
    "moddef": "moderate_fitting:ModerateFitting",
    "pdb": "pdb:PDB",
    "psim": "psim:PSIM",
    "mb_defense": "mb_defense:MBDefense",
    "reserved_only": "controls:ReservedOnly",
    "key_without_relabel": "controls:KeyWithoutRelabel",
    "suffix_only": "controls:SuffixOnly",
    "expansion_only": "controls:ExpansionOnly",
    "clean_only": "controls:CleanOnly",
}


def get_defense(name: str | Defense, **options: Any) -> Defense:
    """
    Find a defense and set it up.

    Args:
        name (`str` or `Defense`):
            Name of a built-in defense, import path `package.module:Class` of a subclass of [`Defense`], or a defense,
            which is returned as it is.
        **options:
            Options of that defense.

    Returns:
        `Defense`: the defense.

    Examples:

    ```python
    >>> from p2p_trainer.defenses import get_defense

    >>> defense = get_defense("pdb", ratio=0.1)
    ```
    """
    if isinstance(name, Defense):
        return name
    if ":" in name:
        defense_class = import_class("defense", name, Defense)
    elif name.lower() in BUILTIN_DEFENSES:
        defense_class = import_class("defense", f"{__package__}.{BUILTIN_DEFENSES[name.lower()]}", Defense)
    else:
        raise unknown_name_error(
            "defense", name, BUILTIN_DEFENSES, "A defense of your own is named as `package.module:Class`."
        )
    try:
        return defense_class(**options)
    except TypeError as error:
        raise ValueError(f"The defense {name!r} does not take these options {sorted(options)}: {error}.") from error


def load_defense(folder: str | Path, trusted: str | None = None, **options: Any) -> Defense | None:
    """
    Load the defense of a saved run.

    The file says which models and files a defense reads; look at it where a folder comes from somebody else.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        trusted (`str`, *optional*):
            Import path `package.module:Class` of a defense that is not this package's and that the file may name.
        **options:
            Options that differ from the file's, such as where a language model is by now.

    Returns:
        `Defense` or `None`: the defense, `None` if the run needs nothing beside its model.

    Raises:
        `ValueError`: its file is damaged, of a later version, names code that is not trusted, or was written before
        the defense was ready.
    """
    path = Path(folder) / GUARD_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, settings, state = content["schema_version"], dict(content["defense"]), content["state"]
        name = settings.pop("name")
        if not isinstance(name, str) or not isinstance(state, dict | None):
            raise TypeError(f"name {name!r}, state {state!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Save the model again.") from error
    if not isinstance(version, int) or version > DEFENSE_SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version!r}, this p2p_trainer reads up to {DEFENSE_SCHEMA_VERSION}. Upgrade "
            f"p2p_trainer."
        )
    if name not in BUILTIN_DEFENSES and name != trusted:
        # Such a folder may come from anywhere, so it may not name code.
        raise ValueError(
            f"{path} names the defense {name!r}, which is none of this package. If you trust it, name it yourself "
            f"(`defense={name!r}`, `--defense {name}`)."
        )
    if state is None:
        raise ValueError(
            f"{path} was written before the defense {name!r} was ready, in a checkpoint: what it chooses after "
            f"training is missing. Load the output folder of the finished run."
        )
    defense = get_defense(name, **{**settings, **options})
    defense.restore(state, Path(folder))
    return defense
