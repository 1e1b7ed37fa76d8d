"""Tasks: where the rows come from and what their labels mean."""

from .task import Task, get_task


__all__ = ["Task", "get_task"]
