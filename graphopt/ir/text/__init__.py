"""The textual form of a graph, `.gir`: the only room that spells it."""
