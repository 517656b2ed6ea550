"""The commands of `python -m lorapr_jax`."""
