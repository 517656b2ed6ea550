"""What a run would need; nothing is loaded or run."""
