"""Time and memory of the head and of losses, beside peers and beside a loss written by hand."""
