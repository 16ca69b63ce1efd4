"""Studies: the study file, the jobs that it declares, and their results."""
