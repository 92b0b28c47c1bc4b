"""Where code runs: devices, random numbers, processes, workers."""
