"""Models as files for other engines, each compared with its model."""
