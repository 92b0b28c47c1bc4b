"""Preprocessing: raw T1-weighted scans -> a BIDS derivative in a template's space."""
