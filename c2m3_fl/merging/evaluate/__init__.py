"""Scores of networks and of what lies between them."""
