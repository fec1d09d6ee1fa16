"""Networks: their symmetries, and what their operators compute."""
