"""What is written, stated: files of parts, and the pieces of them that are made in one go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol

from gralora_convert.disk import TensorSpec, encode_header, read_bytes

Bytes = memoryview | bytearray | bytes
COPY_CHUNK = 32 * 1024 * 1024  # bytes per task: small enough for two workers to share one tensor
COMPUTING = 4  # a byte computed takes so many copied: 1.4 s of CPU a GB, 0.3 s


class Account(Protocol):
    """What making a tensor finds out (its check, its error), as JSON: kept in the journal."""

    def save(self) -> Mapping[str, object]:
        """What is known of the tiles that were made, at least."""
        ...

    def restore(self, saved: Mapping[str, object]) -> None:
        """Learns, besides, what another run or rank knows of some tiles, maybe of the same ones."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """The bytes of a tensor as they are; they are never decoded, so any dtype passes."""

    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor made tile by tile: `produce(i)` gives bytes `[i * tile_bytes, ...)` of it.

    The buffer that it returns may be used again after the worker's next call. `memory` is what
    the tiles of this tensor keep alive together beside one buffer, in bytes (its factors); `effort`
    what making it takes beside its bytes, in bytes copied. Neighbours of one `unit` (the factors of
    a module, each in one tile) are made in one go, in order, by one worker.
    """

    tile_bytes: int
    produce: Callable[[int], memoryview]
    memory: int = 0
    account: Account | None = None
    effort: int = 0
    unit: object = None


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the output: what it is (now) and where its bytes come from (later)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Copied | Computed

    @property
    def how(self) -> str:
        return "compute" if isinstance(self.source, Computed) else "copy"

    @property
    def account(self) -> Account | None:
        return self.source.account if isinstance(self.source, Computed) else None

    @property
    def unit(self) -> object:
        return self.source.unit if isinstance(self.source, Computed) else None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output, its tensors in order."""

    name: str
    parts: tuple[Part, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def header(self) -> bytes:
        return encode_header(
            [(part.name, part.dtype, part.shape, part.nbytes) for part in self.parts], self.metadata
        )

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_nbytes

    @property
    def data_nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[start, stop)` of a file, made in one go: copied from a place in a file, or `made`."""

    start: int
    stop: int
    copied: tuple[Path, int] | None = None
    made: Callable[[], Bytes] | None = None
    effort: int = 0

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """What making it takes, in bytes copied."""
        return 1 + self.nbytes * (1 if self.copied else COMPUTING) + self.effort


def pieces(file: OutputFile) -> Iterator[Piece]:
    """All of a file in the order of its bytes, each made by one worker; neighbouring copies, and
    neighbours of one unit, are joined."""
    position = len(file.header)
    run: Piece | None = None
    for _, neighbours in groupby(file.parts, lambda part: part.unit or part.name):
        parts = [*neighbours]
        stop = position + sum(part.nbytes for part in parts)
        match parts[0].source:
            case Copied(spec=TensorSpec(strides=None) as spec):
                if run and run.copied == (spec.file, spec.offset - run.nbytes):
                    run = replace(run, stop=stop)
                else:
                    yield from _chunks(run)
                    run = Piece(position, stop, copied=(spec.file, spec.offset))
            case source:
                yield from _chunks(run)
                run = None
                if parts[0].unit is None:
                    yield from _tiles(source, position, stop)
                else:
                    yield _joined(parts, position, stop)
        position = stop
    yield from _chunks(run)


def _chunks(run: Piece | None) -> Iterator[Piece]:
    if run and run.copied:
        (path, offset), end = run.copied, run.stop
        for start in range(run.start, end, COPY_CHUNK):
            place = (path, offset + start - run.start)
            yield Piece(start, min(start + COPY_CHUNK, end), copied=place)


def _tiles(source: Copied | Computed, position: int, end: int) -> Iterator[Piece]:
    """A tensor that is computed, or whose elements are out of order in its file."""
    size = source.tile_bytes if isinstance(source, Computed) else COPY_CHUNK
    for tile, start in enumerate(range(position, end, max(size, 1))):
        stop = min(start + size, end)
        made: Callable[[], Bytes]
        if isinstance(source, Computed):
            made = partial(source.produce, tile)
        else:
            made = partial(read_bytes, source.spec, start - position, stop - position)
        yield Piece(start, stop, made=made)


def _joined(parts: Sequence[Part], start: int, stop: int) -> Piece:
    sources = [part.source for part in parts if isinstance(part.source, Computed)]
    effort = sum(source.effort for source in sources)
    return Piece(
        start, stop, effort=effort,
        made=lambda: b"".join(source.produce(0) for source in sources),
    )  # fmt: skip
