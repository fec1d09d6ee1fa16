"""What a network computes: its exported graph, its operators, its calibration batches, its channel moments."""
