"""Measures of pictures, and the intervals that a handful of clips leaves."""
