"""Policies: their definition, and how YAML text is read into them. Nothing here imports torch."""
