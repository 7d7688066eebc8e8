"""Small models written by hand, for tests and examples."""
