"""Studies: what a file declares, its jobs, and their results."""
