"""Full-precision models: loading, conditions, prompts, and the facts about each architecture. Nothing here quantizes."""
