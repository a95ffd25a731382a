"""The benchmark harness: `python -m bench list | run | compare | report | profile`.

Cases, suites and providers are data (`suites`, `providers`, `peers`); `measure` times callables against each other and `memory`
measures peak memory in a child process; `run` checks every provider against float64 before it is timed, and writes section 9's
JSON (`schema.json`). `comparison`, `report` and `profiling` are commands of their own. docs/benchmarks.md tells it all.
"""
