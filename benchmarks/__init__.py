"""Measurements, side by side, whose results are committed as CSV."""
