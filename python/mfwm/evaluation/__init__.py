"""How well trained models do on frames that they were not trained on, and the report that shows it."""

from typing import TYPE_CHECKING, Any

from .latent_actions import evaluate_latent_actions
from .tokenizer import evaluate_tokenizer
from .world_model import evaluate

if TYPE_CHECKING:
    from .report import write_report

__all__ = ["evaluate", "evaluate_latent_actions", "evaluate_tokenizer", "write_report"]


def __getattr__(name: str) -> Any:
    """Load write_report on first use, because it imports matplotlib, which takes 0.3 s."""
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .report import write_report

    return write_report
