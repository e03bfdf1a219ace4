"""Models as files for other engines, each compared with the model that it was made of."""
