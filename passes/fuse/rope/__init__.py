"""Recognises rotary position embeddings."""
