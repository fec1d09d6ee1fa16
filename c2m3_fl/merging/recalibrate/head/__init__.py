"""A last layer fitted to labels: found in the network, its sums and their checks, the fit and its temperature."""
