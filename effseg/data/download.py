"""Download files, and the archives that a dataset card names: resumable, with checksums."""

import hashlib
import http.client
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from effseg import resources
from effseg.data.files import writing
from effseg.errors import InputError, flat

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """One archive of a card."""

    name: str
    url: str
    md5: str
    creates: str
    """The folder that the archive holds, relative to the root, with `/`."""


def read_archives(card: str) -> list[Archive]:
    """Read the sources of a shipped dataset card."""
    entries = resources.load_yaml(resources.find("datasets", card)).get("sources", [])
    return [Archive(**entry) for entry in entries]


def download_voc2012(root: Path) -> Path:
    """Download VOC 2012 and, for `train_aug`, SBD, unless they exist; return the folder `VOC2012`.

    They take 4 GB, and as much again meanwhile.
    """
    voc, sbd = read_archives("voc2012")
    folder = fetch(voc, root.expanduser())
    fetch(sbd, root.expanduser())
    return folder


def fetch(archive: Archive, root: Path) -> Path:
    """Download and unpack an archive unless its folder exists; the archive is then deleted."""
    target = root / archive.creates
    if not target.exists():
        file = download(archive.url, root, archive.md5)
        extract(file, root, archive.creates)
        file.unlink()
    return target


def download(
    url: str, folder: str | Path, md5: str | None = None, sha256: str | None = None
) -> Path:
    """Download a file, or the rest of it after an interrupted try.

    Bytes are collected in `NAME.part`, which is renamed when it is complete and its sum right. NAME
    is the last part of the URL; sums are hexadecimal, the first digits are enough.

    InputError: the server cannot be reached or refuses, the transfer stops (the part is kept for
    the next try), the sum is wrong (the part is deleted), or a folder has the file's name.
    """
    folder = Path(folder).expanduser()
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    target, part = folder / name, folder / f"{name}.part"
    if target.is_file():
        _check_sums(target, md5, sha256, f"for {url}; delete the file and try again")
        return target
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (target, part):
        if path.is_dir():  # else known only after the whole transfer
            raise InputError(f"{path}: is a folder, expected to write {url} there")
    before = _size(part)
    while missing := _transfer(url, part):
        if _size(part) <= before:
            raise InputError(
                f"{url}: the connection broke off, {missing} missing; run it again to continue "
                f"from {part}"
            )
        before = _size(part)
    try:
        _check_sums(part, md5, sha256, f"for {url}; the file is deleted, try again")
    except InputError:
        part.unlink()
        raise
    with writing(target):
        part.replace(target)
    return target


def extract(archive: Path, root: Path, creates: str) -> Path:
    """Unpack a tar archive into a temporary folder and move its folder `creates` to the root.

    Members that point outside, including links and devices, are refused (tarfile's data filter).
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"{archive}: expected Python 3.11.4 or newer, which unpacks it safely")
    with tempfile.TemporaryDirectory(
        prefix=".extract-", dir=root, ignore_cleanup_errors=True
    ) as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{archive}: cannot be unpacked: {error}") from error
        unpacked, target = Path(temporary) / creates, root / creates
        if not unpacked.is_dir():
            raise InputError(f"{archive}: holds no folder {creates}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(target)
    return target


def _transfer(url: str, part: Path) -> str:
    """Append what the server sends to `part`; return what is still missing, empty if nothing."""
    start = _size(part)
    try:
        headers = {"Range": f"bytes={start}-"} if start else {}
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if response.status != 206:
                start = 0  # the server sends all of it, whatever was asked
            length = int(response.headers.get("Content-Length") or 0)
            broken = _receive(response, part, start, length)
            missing = start + length - _size(part)
            if length and missing > 0:
                return f"{missing} bytes are"
            return "an unknown number of bytes is" if broken and not length else ""
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing after our last byte: the sum will tell
            return ""
        raise InputError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = flat(getattr(error, "reason", error))
        raise InputError(f"{url}: cannot be fetched: {reason}") from error


def _receive(response: http.client.HTTPResponse, part: Path, start: int, length: int) -> bool:
    """Append the answer to `part`; return whether it broke off, as far as that can be seen."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        part.open("ab" if start else "wb") as file,
    ):
        task = progress.add_task(part.stem, total=start + length or None, completed=start)
        try:
            while chunk := response.read1(_CHUNK):  # `read` loses what came before a break
                file.write(chunk)
                progress.advance(task, len(chunk))
        except (http.client.IncompleteRead, ConnectionError, TimeoutError):
            return True
    return False


def _check_sums(path: Path, md5: str | None, sha256: str | None, hint: str) -> None:
    for kind, expected in (("md5", md5), ("sha256", sha256)):
        if expected is None:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, partial(hashlib.new, kind, usedforsecurity=False))
        if not digest.hexdigest().startswith(expected.lower()):
            raise InputError(f"{path}: {kind} {digest.hexdigest()}, expected {expected} {hint}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
