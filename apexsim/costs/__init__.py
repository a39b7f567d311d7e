"""How long and how much things take: pure functions of specs and batch statistics."""
