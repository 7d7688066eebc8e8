"""What a graph costs: FLOPs and bytes of every call, and machines to hold them against."""
