"""`python -m score_kernels doctor | demo`. Nothing here imports torch, so that the doctor can tell what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m score_kernels", description="SCORE in fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what works on this machine, and how to mend what does not")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument(
        "--verify",
        action="store_true",
        help="compare every fused kernel with float64 on this GPU, and let auto take what is right",
    )
    demo = commands.add_parser("demo", help="correctness, training on digits and a small benchmark, in under 3 minutes")
    demo.add_argument("--quick", action="store_true", help="fewer seeds, epochs and shapes: about half a minute")
    demo.add_argument("--seed", type=int, default=0, help="the first random seed (default 0)")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        from .doctor import run as run_doctor

        return run_doctor(as_json=given.json, verify=given.verify)
    from .demo import run as run_demo

    return run_demo(quick=given.quick, seed=given.seed)


if __name__ == "__main__":
    sys.exit(main())
