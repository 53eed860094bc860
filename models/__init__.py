"""Model definitions: pure functions of parameters and arrays, without mesh, text or I/O beyond `hf`."""
