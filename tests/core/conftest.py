"""Hypothesis draws the same examples in every run, and no example fails for a slow machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("laws", deadline=None, derandomize=True)
settings.load_profile("laws")
