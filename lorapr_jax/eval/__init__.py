"""Measures a model: perplexity, tasks, generated text, latency."""
