"""Runs that survive the death of the server."""
