"""Losses of the segmentation and detection tasks."""
