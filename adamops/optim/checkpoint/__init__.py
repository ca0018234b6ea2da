"""States as checkpoints hold them, and as they are loaded."""
