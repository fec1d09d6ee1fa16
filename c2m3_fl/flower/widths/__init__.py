"""Clients of other widths than the model's: what they are sent, and what becomes of their replies."""
