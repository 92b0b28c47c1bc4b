"""What a run folder holds, and how MLflow gets it: journal, record, lock, store, dashboard."""
