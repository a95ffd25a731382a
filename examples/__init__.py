"""The paper's experiments on this package's ops, and a training script for many processes: `python -m examples.NAME`."""
