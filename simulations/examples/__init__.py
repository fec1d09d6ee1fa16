"""Short programs that the pages quote; each runs as ``python -m simulations.examples.NAME``."""
