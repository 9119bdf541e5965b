"""World model, its heads and its rollouts; video tokenizer; latent action model."""

from .distributions import Distribution
from .heads import MultiFrameHeads
from .heads_config import HeadsConfig
from .latent_actions import LatentActions, LatentActionsConfig
from .rollouts import random_actions, rollout, rollout_in_jumps, rollout_with_drift
from .terms import HeadsLoss
from .tokenizer import Tokenizer, TokenizerConfig
from .world_model import WorldModel, WorldModelConfig

__all__ = [
    "Distribution",
    "HeadsConfig",
    "HeadsLoss",
    "LatentActions",
    "LatentActionsConfig",
    "MultiFrameHeads",
    "Tokenizer",
    "TokenizerConfig",
    "WorldModel",
    "WorldModelConfig",
    "random_actions",
    "rollout",
    "rollout_in_jumps",
    "rollout_with_drift",
]
