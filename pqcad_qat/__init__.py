"""PQCAD-QAT: progressive quantization and calibration-assisted distillation of diffusion models for Intel CPUs."""

__version__ = "0.1.0"
