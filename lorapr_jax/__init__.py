"""Structured pruning of LLaMA models, guided by LoRA: LoRAPrune in JAX."""
