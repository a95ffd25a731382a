"""The build: Python only in this version. The version number is the one in `score_kernels/__init__.py`."""

import re
from pathlib import Path

from setuptools import setup

INIT = Path(__file__).parent / "score_kernels" / "__init__.py"

match = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)
if match is None:
    raise RuntimeError(f'{INIT}: expected a line __version__ = "..."')
setup(version=match[1])
