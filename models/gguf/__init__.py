"""GGUF files: header, blocks, tokenizer and configuration of a model."""
