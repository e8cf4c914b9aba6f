"""What every room may lean on and that knows nothing of diffusion: files, processes, cores, shared stores."""
