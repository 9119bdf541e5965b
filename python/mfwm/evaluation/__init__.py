"""How well a trained world model predicts frames that it never saw, and the report that shows it."""

from .report import write_report
from .world_model import evaluate

__all__ = ["evaluate", "write_report"]
