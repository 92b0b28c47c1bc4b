"""All stages of a preset in turn."""
