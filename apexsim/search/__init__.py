"""Which deployment is best: space, objective, study, executors."""
