"""The proof that every token row is computed on its own, rule by rule."""
