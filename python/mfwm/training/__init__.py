"""One training loop, and what it trains: world models, tokenizers, latent action models, or a module of your own."""

from .latent_actions import LatentActionsTraining, load_latent_actions, train_latent_actions
from .tokenizer import TokenizerTraining, load_tokenizer, train_tokenizer
from .trainer import Objective, Trainer, TrainerConfig
from .world_model import TrainingConfig, for_replay, load_model, train

__all__ = [
    "LatentActionsTraining",
    "Objective",
    "TokenizerTraining",
    "Trainer",
    "TrainerConfig",
    "TrainingConfig",
    "for_replay",
    "load_latent_actions",
    "load_model",
    "load_tokenizer",
    "train",
    "train_latent_actions",
    "train_tokenizer",
]
