"""From text to batches of token windows."""
