"""Federations in simulation: a Flower app, and the comparisons that ``c2m3-fl compare`` draws."""
