"""Cost forms: physics with a few coefficients, pure functions of shapes, coefficients and hardware."""
