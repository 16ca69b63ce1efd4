"""`python -m srm_kernels verify`: check whether the kernels give correct results on this device, and time them."""
