"""What happened in a compilation, as values: records, the text of every step, differences."""
