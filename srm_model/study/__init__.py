"""Studies: the declaration in a file, its jobs, and their results."""
