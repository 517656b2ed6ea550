"""Turns text into batches of token windows."""
