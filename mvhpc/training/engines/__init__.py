"""A network with its optimiser: in one process, or distributed over workers by DeepSpeed."""
