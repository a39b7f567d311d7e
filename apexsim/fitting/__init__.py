"""From tables of measured kernels to device profiles."""
