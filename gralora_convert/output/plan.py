"""Sizes now, bytes later: what a verb will write, complete or not at all.

A verb states its whole output as a `Plan`: every file, every tensor with dtype and shape, and for
each tensor either the place whose bytes it copies or the tiles that compute it. `Plan.write` makes
the bytes in a folder beside the output and publishes that folder with one rename.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from gralora_convert.adapters import CONFIG_NAME, scan_adapter
from gralora_convert.disk import (
    RECEIPT_NAME,
    TensorFile,
    dump_json,
    load_json,
    measured,
    read_safetensors,
    reading,
)
from gralora_convert.errors import CheckFailedError, MisuseError, OutputError, UnreadableError
from gralora_convert.output.journal import (
    Done,
    Journal,
    clear_journals,
    journal_names,
    read_journals,
)
from gralora_convert.output.parts import Account, Computed, OutputFile, Piece, pieces
from gralora_convert.output.ranks import Meeting, Ranks, meeting
from gralora_convert.output.receipt import altered_files
from gralora_convert.output.staging import Staging
from gralora_convert.output.writing import (
    begin_files,
    begins_as,
    copy_file,
    write_files,
    write_text,
)
from gralora_convert.system import usable_cpus
from gralora_convert.version import __version__

DIGESTED_BYTES = 256 * 1024 * 1024  # outputs up to this size get digests unasked: below 0.3 s
CONSTANT_MEMORY = 260 * 1024 * 1024  # interpreter, torch and its allocator, measured at import


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one command will write.

    `texts` are small files by name, `sidecars` files to copy; `inputs` must not change while the
    plan is carried out. `receipt` is called once, when all tensors are written: it may raise
    `CheckFailedError`, and what it returns is written into the output and returned by `write`.
    `settings` is what decides the bytes beside files and inputs. `resumable` says that everything
    which making a tensor finds out is in the account of its part, so that others may make it.
    `prepare` is called once, in a thread of its own: what computing a tensor waits for, and copying
    does not. `meanwhile` is called once while tensors are made: work that the receipt needs done.
    """

    command: str
    files: tuple[OutputFile, ...]
    receipt: Callable[[], dict[str, object]]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    inputs: tuple[TensorFile, ...] = ()
    protected: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    resumable: bool = False
    prepare: Callable[[], object] = lambda: None
    meanwhile: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        held = self.contents()
        return f"Plan({self.command!r}, {held['tensors']} tensors, {held['bytes']:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the output; the receipt's few KiB are not counted."""
        return (
            sum(file.nbytes for file in self.files)
            + sum(len(text) for text in self.texts.values())
            + sum(_size(path) for path in self.sidecars.values())
        )

    def contents(self) -> dict[str, object]:
        """The weight files, as plans and receipts state them: `bytes` is their size on the disk."""
        return {
            "tensors": sum(len(file.parts) for file in self.files),
            "bytes": sum(file.nbytes for file in self.files),
            "files": [file.name for file in self.files],
        }

    def peak_memory(self, jobs: int | None = None) -> int:
        """An upper estimate of the anonymous memory of `write`, in bytes."""
        jobs = jobs or usable_cpus()
        computed = [
            part.source
            for file in self.files
            for part in file.parts
            if isinstance(part.source, Computed)
        ]
        tile = max((source.tile_bytes for source in computed), default=0)
        factors = sorted((source.memory for source in computed), reverse=True)[: jobs + 1]
        # a tile lives as stored bytes, as float32 sums and, for the check, as float64 samples
        return CONSTANT_MEMORY + jobs * 6 * tile + 3 * sum(factors)

    def as_json(self, output: Path, jobs: int | None = None) -> dict[str, object]:
        """The plan as `--dry-run --json` prints it."""
        return {
            "command": self.command,
            "dry_run": True,
            "output": str(output),
            **self.contents(),
            "files": [file.name for file in self.files] + sorted({*self.texts, *self.sidecars}),
            "computed": sum(part.how == "compute" for file in self.files for part in file.parts),
            "parts": [
                {
                    "file": file.name,
                    "name": part.name,
                    "dtype": part.dtype,
                    "shape": list(part.shape),
                    "how": part.how,
                }
                for file in self.files
                for part in file.parts
            ],
            "total_bytes": self.nbytes,
            "peak_memory": self.peak_memory(jobs),
            "free_disk": Staging.free_bytes(output),
            "notes": list(self.notes),
        }

    def fingerprint(self) -> str:
        """A digest of all that decides the bytes: runs with the same one can share their work."""
        digest = hashlib.sha256()
        for known in (__version__, self.command, dict(self.settings)):
            digest.update(json.dumps(known, sort_keys=True).encode() + b"\0")
        digest.update(self.texts.get(CONFIG_NAME, b"") + b"\0")
        for file in self.files:
            digest.update(file.name.encode() + b"\0" + file.header)
        for read in self.inputs:
            _, size, modified = read.stamp
            digest.update(f"{read.path.name} {size} {modified}\0".encode())
        return digest.hexdigest()

    def _identity(self, digested: bool) -> str:
        """A digest of all that decides the whole output: of what is copied and said beside the
        tensors, too, and of where the inputs lie."""
        known = repr((self.fingerprint(), digested, sorted(self.texts.items())))
        digest = hashlib.sha256(known.encode("utf-8", "surrogatepass"))
        for path in chain(self.sidecars.values(), (read.path for read in self.inputs)):
            with reading(path):
                status = path.stat()
            stamp = os.path.realpath(path), status.st_size, status.st_mtime_ns
            digest.update(repr(stamp).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _published(self, staging: Staging, identity: str, overwrite: bool) -> dict[str, object]:
        """The receipt of an earlier run like this one, if what it has published is still there.

        `OutputError`: it was altered since, and not `overwrite`."""
        try:
            receipt = load_json(staging.output / RECEIPT_NAME)
        except UnreadableError:
            return {}
        if receipt.get("plan") != identity:
            return {}
        altered = altered_files(staging.output)
        if altered and not overwrite:
            raise OutputError(
                f"is complete, but {altered[0]} was altered since",
                where=staging.output,
                hint="Choose another output, or replace it with `overwrite=True`.",
            )
        return {} if altered else receipt

    def resumable_bytes(self, output: str | Path) -> int:
        """Bytes of tensors that a broken run to `output` has left and `resume` need not make."""
        if not self.resumable:
            return 0
        return read_journals(Staging(Path(output)).folder, self.fingerprint()).nbytes

    def require_allowed(self, output: str | Path, *, overwrite: bool = False) -> None:
        """Raises as `write` does where `output` may not be written."""
        self._staging(output, overwrite, keep=False).require_allowed()

    def _staging(self, output: str | Path, overwrite: bool, keep: bool) -> Staging:
        if not str(output):
            raise MisuseError("the output has an empty name", hint="Name a folder: -o DIR.")
        return Staging(Path(output), overwrite=overwrite, protected=self._protected(), keep=keep)

    def write(
        self,
        output: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        jobs: int | None = None,
        verify: bool = True,
        digests: bool | None = None,
        progress: Callable[[int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> dict[str, object]:
        """Makes the output folder, complete or not at all, and returns its receipt.

        The bytes depend neither on `jobs` (worker threads; default: the CPUs this process may use)
        nor on `ranks`, nor on how often the run was broken off and resumed.

        Arguments:
            resume: goes on from what a broken run of the same plan has left, and leaves what is
                done when it breaks off itself, as several ranks always do. Where such a run has
                ended, with the same inputs and arguments, and all files are as its receipt says
                (`overwrite` or not), returns that receipt.
            digests: whether the receipt states the sha256 of every file, for `validate` to compare
                (None: of outputs up to 256 MiB).
            progress: is called with the number of bytes just written, from any worker.
            ranks: which of several processes this is, that call `write` with the same plan; each
                makes its share of the bytes, and all but rank 0 return {} when it has published.

        Raises:
            MisuseError: a plan that cannot be resumed or shared.
            OutputError: the output exists (and not `overwrite`), overlaps an input, cannot be
                written, or does not fit on the disk; another rank has failed.
            UnreadableError, ChangedInputError: an input failed or changed on the way.
            CheckFailedError: with `verify`, when what was written is not what was planned.
        """
        ranks = ranks or Ranks()
        jobs = max(1, usable_cpus() // max(1, ranks.local)) if jobs is None else jobs
        self._require_possible(jobs, resume, ranks)
        staging = self._staging(output, overwrite, keep=resume or ranks.size > 1)
        plan = self.fingerprint()
        digested = self.nbytes <= DIGESTED_BYTES if digests is None else digests
        identity = self._identity(digested)
        if resume and (receipt := self._published(staging, identity, overwrite)):
            if not ranks.is_leader:
                return {}
            staging.tidy()
            return receipt

        def begun(folder: Path) -> set[str]:
            return {*read_journals(folder, plan).ranges, *journal_names(folder, plan)}

        if ranks.size > 1:
            staging.require_allowed()  # by each at once, before they wait for one another
        with meeting(ranks, staging.output, plan) as others:
            make = partial(self._make, plan, others, jobs, progress or (lambda count: None))
            if not ranks.is_leader:
                make(staging.folder, Done())
                others.gather()  # published
                return {}
            left = self.resumable_bytes(output) if resume else 0
            with staging.open(self.nbytes - left, begun if resume else None) as folder:
                make(folder, self._begin(folder, plan))
                receipt = self._finish(folder, verify, digested, identity)
                staging.publish()
                with contextlib.suppress(OutputError):  # it is complete, whoever is lost now
                    others.gather()
        return receipt

    def _begin(self, folder: Path, plan: str) -> Done:
        """What a broken run of this plan has left in `folder`: its accounts are restored, and what
        it has not begun is begun."""
        done = read_journals(folder, plan)
        for file in self.files:
            if file.name in done.ranges and not begins_as(folder / file.name, file):
                (folder / file.name).unlink(missing_ok=True)  # not what was begun
                del done.ranges[file.name]
        begin_files(folder, (file for file in self.files if file.name not in done.ranges))
        self._restore(done.states)
        return done

    def _restore(self, states: Mapping[tuple[str, str], Mapping[str, object]]) -> None:
        accounts = dict(self._accounts())
        for (_, name), state in states.items():
            if name in accounts:
                accounts[name].restore(state)

    def _accounts(self) -> Iterator[tuple[str, Account]]:
        for file in self.files:
            yield from (
                (part.name, part.account) for part in file.parts if part.account is not None
            )

    def _make(
        self,
        plan: str,
        others: Meeting,
        jobs: int,
        progress: Callable[[int], None],
        folder: Path,
        done: Done,
    ) -> None:
        """Makes this rank's share of what rank 0 has not found `done`; afterwards each rank knows
        what all have found out."""
        done.ranges = others.gather(done.ranges)[0]
        progress(done.nbytes)
        write_files(
            folder,
            self.share(done, others.ranks),
            jobs=jobs,
            progress=progress,
            journal=Journal(folder, plan) if self.resumable else None,
            tick=others.require_others,
            prepare=self.prepare,
            meanwhile=self.meanwhile if others.ranks.is_leader else lambda: None,
        )
        for file in self.inputs:
            file.require_unchanged()
        found = {name: account.save() for name, account in self._accounts()}
        for states in others.gather(found):
            self._restore({("", name): state for name, state in states.items()})

    def share(self, done: Done, ranks: Ranks) -> Iterator[tuple[OutputFile, list[Piece]]]:
        """What of the pieces that are not done this rank makes, by file."""

        def todo() -> Iterator[tuple[OutputFile, Piece]]:
            for file in self.files:
                for piece in pieces(file):
                    if not done.has(file.name, piece.start, piece.stop):
                        yield file, piece

        mine = ranks.share(todo, lambda one: one[1].cost)
        for _, group in groupby(mine, lambda one: one[0].name):
            held = list(group)
            yield held[0][0], [piece for _, piece in held]

    def _require_possible(self, jobs: int, resume: bool, ranks: Ranks) -> None:
        if type(jobs) is not int or jobs < 1:
            raise MisuseError(f"{jobs!r} jobs were asked for, a whole number from 1 on is needed")
        if not self.resumable and (resume or ranks.size > 1):
            raise MisuseError(
                f"{self.command} runs in one process and in one go",
                hint="" if resume else "Start it without a launcher.",
            )

    def _protected(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.protected, *(file.path for file in self.inputs))))

    def _finish(
        self, folder: Path, verify: bool, digests: bool, identity: str
    ) -> dict[str, object]:
        """Everything beside the tensors; returns the receipt."""
        for name, path in self.sidecars.items():
            copy_file(path, folder / name)
        for name, text in self.texts.items():
            write_text(folder / name, text)
        for file in self.inputs:
            file.require_unchanged()
        if verify:
            self._require_as_planned(folder)
        if CONFIG_NAME in self.texts:
            _require_sound(folder)
        receipt = self.receipt() | self.contents() | {"plan": identity}
        receipt["outputs"] = self._outputs(folder, digests)
        clear_journals(folder)
        write_text(folder / RECEIPT_NAME, (dump_json(receipt) + "\n").encode())
        return receipt

    def _outputs(self, folder: Path, digests: bool) -> dict[str, dict[str, object]]:
        """What was written, by file, for the receipt; a model card is there to be edited."""
        names = {*(file.name for file in self.files), *self.texts, *self.sidecars} - {"README.md"}
        return {name: measured(folder / name, digest=digests).as_json() for name in sorted(names)}

    def _require_as_planned(self, folder: Path) -> None:
        for file in self.files:
            found = read_safetensors(folder / file.name).tensors
            wanted = {part.name: (part.dtype, part.shape) for part in file.parts}
            if wanted != {name: (spec.dtype, spec.shape) for name, spec in found.items()}:
                raise CheckFailedError(
                    "the file written does not hold the tensors planned",
                    where=file.name,
                    hint="Nothing was published. Is the disk failing?",
                )


def _require_sound(folder: Path) -> None:
    """An adapter that we would not read is not published."""
    if errors := scan_adapter(folder).report.errors:
        raise CheckFailedError(
            f"the adapter made is not sound: {errors[0]}",
            hint="Nothing was published. Please report this with the adapter's config.",
        )


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size
