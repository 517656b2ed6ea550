"""The LLaMA modules and their sizes."""
