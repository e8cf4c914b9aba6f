"""Noise schedules, sampling steps and trajectories, as pure functions over NumPy arrays or torch tensors."""
