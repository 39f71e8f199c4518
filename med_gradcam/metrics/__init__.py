"""The metrics: one file each, what a model and its map say about each other."""
