"""Is a user's policy loss right? Checked on made-up tokens on the CPU, and reported in words."""
