"""For looking: explanations, dumps, the explorer."""
