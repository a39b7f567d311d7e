"""Measure the operators of a device with torch, and serve on it for real: ``python -m kernels_profiling``.

A leaf of the project: it imports apexsim, and apexsim never imports it. Importing the package itself needs no torch.
"""
