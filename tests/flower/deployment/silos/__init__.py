"""A Flower app of three silos."""
