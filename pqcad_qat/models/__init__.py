"""Full-precision models: loading, conditions, prompts, and facts about each architecture. Nothing here quantizes."""
