"""Code of other people on packed weights: what it does with them, and running it."""
