"""One op and one pass for graphopt, found by their entry points (see pyproject.toml)."""
