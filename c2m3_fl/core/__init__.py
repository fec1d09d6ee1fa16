"""The mathematics of matching and averaging: tensors, NumPy and SciPy, no modules, no Flower."""
