"""Tasks to begin a task of one's own from."""
