"""Whether a run fits a slice of TPUs, and how long its steps take, from its compiled programs."""
