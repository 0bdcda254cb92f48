"""Check a user-defined policy loss on made-up tokens on the CPU, and report what is wrong."""
