"""Which deployment is best: space, question, objective, judging, study, executors."""
