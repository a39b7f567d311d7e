"""What happens when: the only room that knows SimPy and nanoseconds."""
