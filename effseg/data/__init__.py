"""Data: photos to samples to batches."""
