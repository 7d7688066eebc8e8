"""Hugging Face folders: configuration, weights, generation settings."""
