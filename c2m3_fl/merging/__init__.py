"""Merging: models in, model out."""
