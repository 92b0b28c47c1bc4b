"""Procedural brains with a known joint law of anatomy, age and sex."""
