"""Quality control of scans: figures of a volume, and a verdict by stated limits."""
