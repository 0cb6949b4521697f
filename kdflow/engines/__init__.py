"""Forward-only models: teachers and rollouts."""
