"""Checkpoints on disk; nothing here knows what is trained."""
