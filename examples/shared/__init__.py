"""What the experiments share: data, a command line, runs that can be interrupted, measuring against the plain loop."""
