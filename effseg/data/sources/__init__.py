"""Sources of images and labels on disk, one class per format."""
