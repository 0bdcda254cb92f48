"""Time and memory of the head and of losses, compared with peers and with a loss written by hand."""
