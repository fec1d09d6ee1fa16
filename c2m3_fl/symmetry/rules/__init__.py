"""One rule per ATen operator, one file per family of operators: how the axes of inputs and outputs correspond."""
