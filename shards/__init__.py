"""Data plane: a table of subjects -> canonical volumes -> WebDataset or Zarr shards -> deterministic reading."""
