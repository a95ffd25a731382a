"""Where the data sets are: `--data`, then SCORE_KERNELS_DATA, then a download into the cache; SHA-256 is always checked."""

from __future__ import annotations

import hashlib
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from score_kernels import settings


class DataError(Exception):
    """A data set that is not there or not whole; the message says what to do."""


@dataclass(frozen=True)
class DataSet:
    file: str
    url: str
    sha256: str


ESOL = DataSet(
    "esol.csv",
    "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/delaney-processed.csv",
    "8c06a76f0c6487d29ab0f903e6a7a7139f189ab3c1178f159c8be8964602f189",
)
TINY_SHAKESPEARE = DataSet(
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def find(data: DataSet, given: Path | None = None) -> Path:
    """The whole file. given: the file, or a folder that has it. Raises DataError."""
    for source, folder in {"--data": given, "SCORE_KERNELS_DATA": settings.data_folder()}.items():
        if folder is None:
            continue
        path = folder / data.file if folder.is_dir() else folder
        if not path.is_file():
            raise DataError(f"{source}: expected {data.file} or a folder with it, got {folder}, which has none: {_fix(data)}")
        return _whole(path, data, source)
    path = settings.cache_folder() / "data" / data.file
    if not path.exists():
        _download(data, path)
    return _whole(path, data, "the cache")


def _whole(path: Path, data: DataSet, source: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != data.sha256:
        raise DataError(
            f"{source}: expected {data.file} with SHA-256 {data.sha256}, got {path} with {found}: delete it, then {_fix(data)}"
        )
    return path


def _download(data: DataSet, path: Path) -> None:
    """Whole or not at all: whoever ends the run meanwhile leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(data.url, timeout=60) as answer:
            part.write_bytes(answer.read())
    except OSError as error:
        raise DataError(f"{data.file} cannot be downloaded ({error}): {_fix(data)}") from error
    part.replace(path)


def _fix(data: DataSet) -> str:
    return f"save {data.url} as {data.file} and give its folder by --data or SCORE_KERNELS_DATA"
