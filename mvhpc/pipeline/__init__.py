"""Runs all stages of a preset in order."""
