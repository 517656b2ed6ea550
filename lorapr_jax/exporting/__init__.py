"""A model leaves: written, read back, compared."""
