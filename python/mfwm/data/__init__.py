"""Replay buffers of video with actions: recording, importing, checking and reading them."""

from .replay import Clips, ClipSampler, Replay, split_levels
from .replay_writer import ReplayWriter

__all__ = ["ClipSampler", "Clips", "Replay", "ReplayWriter", "split_levels"]
