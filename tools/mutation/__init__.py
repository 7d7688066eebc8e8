"""Mutation sampling: does a test fail when one thing in the source is wrong? See `__main__`."""
