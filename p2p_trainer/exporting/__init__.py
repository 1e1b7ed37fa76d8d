"""Saved runs in the formats that other servers read, key included."""

from .exporter import FORMATS, export_run
from .openai_recipe import project


__all__ = ["FORMATS", "export_run", "project"]
