"""One training loop, and what it trains: world models, tokenizers, latent actions."""

from .world_model import TrainingConfig, for_replay, load_model, train

__all__ = ["TrainingConfig", "for_replay", "load_model", "train"]
