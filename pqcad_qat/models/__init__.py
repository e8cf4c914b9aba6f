"""Full-precision models: loading, conditions, prompts, and what is known of each architecture. No quantization here."""
