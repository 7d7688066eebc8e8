"""Is it right: the oracle, numeric checks, bisection, golden files, checked inputs."""
