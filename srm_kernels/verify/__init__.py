"""`python -m srm_kernels verify`: measure on the device at hand whether the kernels are right and how fast they are."""
