"""Recognises normalisations."""
