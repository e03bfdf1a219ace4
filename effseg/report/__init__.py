"""Reports of one run or several as one HTML file, and the browser demo."""
