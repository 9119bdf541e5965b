"""How well trained models do on frames that they were not trained on, and the report that shows it."""

from .latent_actions import evaluate_latent_actions
from .report import write_report
from .tokenizer import evaluate_tokenizer
from .world_model import evaluate

__all__ = ["evaluate", "evaluate_latent_actions", "evaluate_tokenizer", "write_report"]
