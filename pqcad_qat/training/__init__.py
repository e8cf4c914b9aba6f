"""Training: one loop, and the callbacks that make it pretraining, progressive quantization or distillation."""
