"""What may follow an average: corrections from what the aligned endpoints do on calibration data."""
