"""A saved run: found, loaded without running anything that its folder brings, and what it answers."""

from .answers import Classification, Response
from .folder import find_run
from .loading import SavedRun, load_encoder, load_run
from .run_config import read_run


__all__ = ["Classification", "Response", "SavedRun", "find_run", "load_encoder", "load_run", "read_run"]
