"""Diffusion itself: denoisers, sampling, images and full-precision calibration sets. No quantization here."""
