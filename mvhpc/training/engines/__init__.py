"""A network with its optimiser: in one process, or spread over workers by DeepSpeed."""
