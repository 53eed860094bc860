"""Questions: tasks, data sets and files, and the endless stream of them."""
