"""Which units of a network may move: discovered from its graph, proven on numbers."""
