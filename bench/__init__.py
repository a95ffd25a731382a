"""The benchmark harness: `python -m bench list` and `python -m bench run`.

Cases, suites and providers are data (`cases`, `providers`); `measure` times callables against each other and `memory` measures
peak memory in a child process; `run` checks every provider against float64 before it is timed, and writes section 9's JSON
(`schema.json`).
"""
