"""Packing in units of whole shards: plan, make, journal, merge."""
