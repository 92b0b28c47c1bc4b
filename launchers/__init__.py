"""Control plane: a stage, a number of nodes and overrides -> local processes or cluster jobs."""
