"""A config, read, split and checked."""
