"""Reading files that somebody else made: regular ones, JSON within limits."""
