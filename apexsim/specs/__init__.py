"""What things are: frozen values, no behaviour in time."""
