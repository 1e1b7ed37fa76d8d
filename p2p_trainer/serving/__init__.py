"""Serving a defended model: an engine that answers many clients in batches, and the HTTP server on it."""

from .answering import Answer, Piece
from .batching import BadPrompt, BatchFailed, Closed, EngineError, Overloaded
from .engine import Engine, Stats


__all__ = ["Answer", "BadPrompt", "BatchFailed", "Closed", "Engine", "EngineError", "Overloaded", "Piece", "Stats"]
