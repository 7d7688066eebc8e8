"""Recognises attention by meaning: products, softmax, masks, however they are spelled."""
