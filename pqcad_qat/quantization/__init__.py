"""Quantization: from rules to a plan, Brevitas quantizers, and quantized modules. Training is in training/."""
