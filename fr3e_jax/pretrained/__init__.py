"""A checkpoint on disk and a model on a mesh, and what turns one into the other."""

import os

# transformers would advise to install torch when it is imported, but only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
