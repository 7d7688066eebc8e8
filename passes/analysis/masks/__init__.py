"""What attention masks mean: index algebra, its reading from a graph, and the proof."""
