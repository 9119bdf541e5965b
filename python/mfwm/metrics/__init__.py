"""Measures of pictures, and the confidence intervals that a limited number of clips allows."""

from .intervals import drift_signal, interval
from .lpips import LPIPS
from .quality import psnr, similarity, squared_error

__all__ = ["LPIPS", "drift_signal", "interval", "psnr", "similarity", "squared_error"]
