"""Evaluate: recall of the published index on photos with known answers, beside the untrained encoder."""
