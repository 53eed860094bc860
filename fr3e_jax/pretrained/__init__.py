"""A checkpoint on disk and a model on a mesh, and what turns one into the other."""
