"""apexsim: which deployment of a model serves a workload within its SLO at the least cost, energy or hardware."""

__version__ = "0.1.0"
