"""Real images, and full-precision calibration sets."""
