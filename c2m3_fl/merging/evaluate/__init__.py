"""Scores of networks and of their combinations, and decisions by scores."""
