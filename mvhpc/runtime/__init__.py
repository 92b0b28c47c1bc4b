"""Devices, random numbers, temporary folders, processes and workers."""
