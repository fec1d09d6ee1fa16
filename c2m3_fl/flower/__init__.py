"""The adapters to Flower: strategies, records, checkpoints, and a federation inside one process."""
