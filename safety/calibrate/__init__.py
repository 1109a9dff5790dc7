"""Fit the three defenses and the trace detector for one model, from samples."""
