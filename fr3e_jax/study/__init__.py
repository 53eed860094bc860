"""Studies: arms x tasks x seeds of training runs, their results in one file, and what these say."""
