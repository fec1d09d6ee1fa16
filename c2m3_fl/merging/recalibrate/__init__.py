"""Recalibrations: corrections of an average by its aligned endpoints' outputs on calibration data."""
