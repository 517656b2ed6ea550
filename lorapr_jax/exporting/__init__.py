"""Exports: a model is written, read back and compared."""
