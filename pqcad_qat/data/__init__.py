"""Real images, and calibration sets recorded with full-precision models."""
