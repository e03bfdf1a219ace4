"""Sources: what lies on disk, one class a format."""
