"""Measured serving runs beside simulated ones: read, replay, score."""
