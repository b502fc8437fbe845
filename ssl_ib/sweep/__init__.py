"""A grid of runs: its points, running them one process each, and the table and the plot that come of them."""
