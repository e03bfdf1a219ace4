"""Models: layers, BiFPN, heads, EffSeg, the family."""
