"""FR3E as pure functions of arrays: no model, no I/O, no clock."""
