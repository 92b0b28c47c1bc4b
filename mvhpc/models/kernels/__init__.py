"""Faster forms of layers and blocks; results change by rounding at most."""
