"""The policy: its definition, and how YAML text becomes it. No torch here."""
