"""Models: layers, BiFPN, heads, networks, and the family of sizes."""
