"""Federations in simulation: a Flower app, and the comparisons that ``c2m3-fl compare`` draws."""

from c2m3_fl.extras import require

require("simulation", "datasets", "flwr", "flwr_datasets", "pyarrow", "sklearn")
