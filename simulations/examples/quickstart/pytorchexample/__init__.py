"""Flower's PyTorch quickstart with a choice of strategies."""
