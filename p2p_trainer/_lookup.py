"""Turns the names that users write in YAML and on the command line into objects."""

import difflib
import importlib
from collections.abc import Iterable


def unknown_name_error(kind: str, name: str, known: Iterable[str], hint: str) -> ValueError:
    """Build the error for a name that nothing answers to; it names the nearest known one."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    guess = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"Unknown {kind} {name!r}.{guess} Known: {', '.join(known)}. {hint}")


def import_class(kind: str, path: str, base: type) -> type:
    """
    Import `package.module:Class` and check that it is the right kind of class.

    Args:
        kind (`str`):
            What is looked for, for the messages: `"attack"`, say.
        path (`str`):
            Import path, `package.module:Class`.
        base (`type`):
            Class that the result has to extend.

    Returns:
        `type`: the class.
    """
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"The {kind} {path!r} can't be imported: {error}. Install the package or run from the folder that holds "
            f"the module, and write it as `package.module:Class`."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"The {kind} {path!r} names {found!r}, which is no subclass of `{base.__module__}.{base.__qualname__}`. "
            f"Write it as `package.module:Class` and extend that class."
        )
    return found
