"""Text that every machine has: the Python sources installed on it, as bytes.

Files are deduplicated by content and split by a hash of their content, so that a file never stands
on both sides and the split does not depend on where the files lie. Between two files stands one
zero byte, which source text does not hold.
"""

import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 20  # one file in so many is for validation
INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8 [bytes]
    validation: Tensor  # uint8 [bytes]
    num_files: int
    num_duplicates: int

    def __str__(self) -> str:
        return (
            f"{self.num_files} files ({self.num_duplicates} duplicates dropped), "
            f"{self.train.numel() / 1e6:.1f} MB to train on, "
            f"{self.validation.numel() / 1e6:.1f} MB to validate on"
        )


def load(which: str) -> Corpus:
    """The corpus "stdlib", "all" (every installed package too) or a folder's *.py files."""
    if which == "stdlib":
        return build(standard_library())
    if which == "all":
        return build([*standard_library(), *packages()])
    if Path(which).is_dir():
        return build(sources(Path(which)))
    raise ValueError(f"corpus is 'stdlib', 'all' or a folder, got {which!r}")


def standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return (path for path in sources(root) if not INSTALLED & set(path.parts))


def packages() -> Iterator[Path]:
    """The files of every folder that packages are installed in and this interpreter reads."""
    roots = {*site.getsitepackages(), *(sysconfig.get_path(p) for p in ("purelib", "platlib"))}
    roots.add(str(Path(torch.__file__).parents[1]))  # a virtual environment's base installation
    return (path for root in sorted(roots) for path in sources(Path(root)))


def sources(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*.py")) if path.is_file())


def build(paths: Iterable[Path]) -> Corpus:
    """The files' contents, each content once, in the order of their hashes."""
    contents: dict[bytes, bytes] = {}
    num_read = 0
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError:  # a dangling link, or not ours to read
            continue
        if text.strip():
            num_read += 1
            contents[hashlib.sha256(text).digest()] = text
    sides = ([], [])
    for digest in sorted(contents):
        sides[int.from_bytes(digest[:8]) % VALIDATION_SHARE == 0].append(contents[digest])
    if not all(sides):
        raise ValueError(
            f"{len(contents)} different Python files are too few to train on some and validate "
            "on others: name a folder with more"
        )
    train, validation = (
        torch.frombuffer(bytearray(b"\0".join(side)), dtype=torch.uint8) for side in sides
    )
    return Corpus(train, validation, len(contents), num_read - len(contents))


class Windows:
    """text[bytes] in windows of ``context`` tokens, shuffled by a seed: batch ``i`` of them.

    A pure function of its arguments, so a resumed run sees what an uninterrupted one sees. No
    window comes twice before every one has come once. Batches are made where the text lies, so on
    a GPU no step waits for the ones before.
    """

    def __init__(self, text: Tensor, *, context: int, batch: int, seed: int) -> None:
        self.text, self.context, self.batch, self.seed = text, context, batch, seed
        self.num_windows = (text.numel() - 1) // context
        self.num_batches = self.num_windows // batch  # in an epoch
        if not self.num_batches:
            raise ValueError(
                f"{text.numel()} bytes do not fill one batch of {batch} windows of {context}: "
                "use more text or a smaller batch"
            )
        self.order: tuple[int, Tensor] = (-1, text)
        self.within = torch.arange(context + 1, device=text.device)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """tokens[batch, context], targets[batch, context]: the bytes that follow them."""
        epoch, at = divmod(i, self.num_batches)
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_windows, generator=generator)
            self.order = epoch, order.to(self.text.device)
        starts = self.order[1][at * self.batch :][: self.batch] * self.context
        rows = self.text[starts[:, None] + self.within].long()
        return rows[:, :-1], rows[:, 1:]
