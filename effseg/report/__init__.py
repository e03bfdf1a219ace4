"""A run, or several side by side, as one HTML file; the demo in a browser."""
