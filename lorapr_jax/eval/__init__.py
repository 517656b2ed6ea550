"""Perplexity and latency."""
