"""Which kernels `doctor --verify` found right on this machine: one file for each build of the package, read by `auto`.

Two builds differ in the sources of the kernels, the compiled module, torch or Triton. What another build was found to do says
nothing of this one, so its file is not read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from .settings import cache_folder

Verified = frozenset[tuple[str, int]]

PACKAGE = Path(__file__).parent
# Key of what the ranks of a process group agree on, in the store through which they met.
SHARED_KEY = "score_kernels/verified"


@functools.cache
def build() -> str:
    """What tells this build from others."""
    digest = hashlib.sha256()
    sources = [
        *PACKAGE.glob("*.py"),
        *PACKAGE.glob("triton_kernels/*.py"),
        *PACKAGE.glob("_cuda*.so"),
        *PACKAGE.glob("_cuda*.pyd"),
    ]
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    for package in ("torch", "triton"):
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"no {package}".encode())
    return digest.hexdigest()[:16]


def path() -> Path:
    """The file of this build."""
    return cache_folder() / "verified" / f"{build()}.json"


def write(entries: list[dict[str, Any]]) -> Path:
    """Records what passed, for this build: dicts with "backend", "arch" (90 for 9.0) and whatever tells a reader more."""
    where = path()
    where.parent.mkdir(parents=True, exist_ok=True)
    part = where.with_suffix(".part")
    part.write_text(json.dumps({"verified": entries}, indent=1) + "\n")
    part.replace(where)
    return where


def recorded() -> Verified:
    """(backend, arch) of the kernels that were found right here.

    In a process group all ranks take what the first of them to ask has on record: kernels differ in how they round, and which
    ones run must not depend on the rank.
    """
    found = _read()
    store = _store()
    if store is None:
        return found
    agreed = store.compare_set(SHARED_KEY, "", json.dumps(sorted(found)))
    return frozenset((backend, arch) for backend, arch in json.loads(agreed))


def _read() -> Verified:
    """Nothing, where there is no record or what stands there is none."""
    if not (cache_folder() / "verified").is_dir() or not path().exists():
        return frozenset()
    try:
        entries = json.loads(path().read_text())["verified"]
        return frozenset((str(entry["backend"]), int(entry["arch"])) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def _store() -> Any:
    """The store of the default process group, or None outside one."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # torch has no public name for it; a collective would need all ranks to call at the same time, which they need not.
    return distributed.distributed_c10d._get_default_store()
