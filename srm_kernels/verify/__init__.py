"""`python -m srm_kernels verify`: measure whether the kernels are right on this device, and how fast they are."""
