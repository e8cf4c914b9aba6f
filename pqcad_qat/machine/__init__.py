"""General tools for every package that know nothing of diffusion: files, processes, cores, shared stores."""
