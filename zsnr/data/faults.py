"""Faults of the data: counted, logged, and limited by a budget."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Literal

from zsnr.files import replacing, side_file
from zsnr.public import public_text, public_url
from zsnr.untrusted import open_regular, shown

_FREE = 10  # broken samples that no budget counts: one of the first three does not mean a third
_KINDS = ("shard", "sample", "passing", "note")
_MAX_REASONS, _MAX_LISTED = 1000, 5  # reasons that are distinguished, and that a summary lists
_LONGEST_LINE = 1 << 20  # bytes of a ledger's line


@dataclass(frozen=True)
class Fault:
    """A fault of the data.

    Args:
        kind: "shard" = a shard is missing or truncated, "sample" = a sample is permanently broken,
            "passing" = a read failed and was retried, "note" = nothing is broken, but a shard holds
            something that is not read.
        shard: Path or address, without passwords and signatures, and passed through `as_utf8`.
        key: Key of the sample. None = the fault concerns the whole shard.
        reason: Explanation in one line.
        position: The sample's position in the run. None = the fault was found by indexing.
    """

    kind: Literal["shard", "sample", "passing", "note"]
    shard: str
    key: str | None
    reason: str
    position: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shard", as_utf8(public_url(self.shard)))
        object.__setattr__(self, "key", None if self.key is None else as_utf8(self.key))
        object.__setattr__(self, "reason", public_text(self.reason))


def as_utf8(text: str) -> str:
    """Escape bytes that are not UTF-8, which Python represents as surrogates."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def as_fault(value: object) -> Fault:
    """Read a fault from its plain values.

    Raises:
        ValueError: The value is not a fault.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "kind": (str,),
        "shard": (str,),
        "key": (str, NoneType),
        "reason": (str,),
        "position": (int, NoneType),
    }
    if not isinstance(value, dict) or value.keys() - {"position"} != kinds.keys() - {"position"}:
        raise ValueError(f"{shown(value)} is not a fault")
    for name, allowed in kinds.items():
        if type(value.get(name)) not in allowed:
            raise ValueError(f"a fault's {name} is {shown(value.get(name))}")
    if value["kind"] not in _KINDS:
        raise ValueError(f"a fault's kind is {shown(value['kind'])}")
    return Fault(**value)


class BudgetError(ValueError):
    """More of the data is broken than the error budget allows."""


class PackedFaults(Collection[Fault]):
    """Faults stored compressed: about 10 bytes each, where an object takes 400.

    Args:
        faults: The faults.
        parts: Packed faults that come before them.
    """

    def __init__(
        self, faults: Iterable[Fault] = (), parts: Iterable[Collection[Fault]] = ()
    ) -> None:
        self._blocks: list[tuple[int, bytes]] = []
        for part in [*parts, list(faults)]:
            if isinstance(part, PackedFaults):
                self._blocks += part._blocks
            elif part:
                self._blocks.append((len(part), zlib.compress(b"".join(map(_line, part)))))

    def __len__(self) -> int:
        return sum(count for count, _ in self._blocks)

    def __iter__(self) -> Iterator[Fault]:
        for _, block in self._blocks:
            for line in zlib.decompress(block).split(b"\n")[:-1]:
                yield Fault(**json.loads(line))

    def __contains__(self, fault: object) -> bool:
        return any(other == fault for other in self)


class Tally:
    """Running counts of faults by reason, with two examples each, in bounded memory.

    Attributes:
        samples: Number of broken samples.
        shards: Names of lost shards.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.samples = 0
        self.shards: set[str] = set()
        self._groups: dict[tuple[str, str], tuple[int, list[Fault]]] = {}
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Count a fault."""
        if fault.kind == "sample":
            self.samples += 1
        elif fault.kind == "shard":
            self.shards.add(fault.shard)
        group = (fault.kind, _cause(fault))
        if group not in self._groups and len(self._groups) >= _MAX_REASONS:
            group = (fault.kind, "")
        count, examples = self._groups.get(group, (0, []))
        places = {(each.shard, each.key) for each in examples}
        if len(examples) < 2 and (fault.shard, fault.key) not in places:
            examples = [*examples, fault]
        self._groups[group] = count + 1, examples

    def summary(self, kinds: Sequence[str] = _KINDS) -> str:
        """List the reasons, most common first, with two examples each, on one line."""
        return "; ".join(self.reasons(kinds))

    def reasons(self, kinds: Sequence[str] = _KINDS) -> list[str]:
        """List the reasons, most common first, with two examples each."""
        groups = [group for (kind, _), group in self._groups.items() if kind in kinds]
        lines = []
        for count, examples in sorted(groups, key=lambda group: group[0], reverse=True)[
            :_MAX_LISTED
        ]:
            first = examples[0]
            such_as = "such as " * (count > len(examples))
            lines.append(f"{count} x {first.kind}: {first.reason} ({such_as}{_places(examples)})")
        if len(groups) > _MAX_LISTED:
            lines.append(f"and {len(groups) - _MAX_LISTED} other reasons")
        return lines


def _cause(fault: Fault) -> str:
    """Return a reason without what differs between samples: numbers, and names of their files."""
    reason = fault.reason
    if fault.key:
        name = re.escape(PurePosixPath(fault.key).stem)
        reason = re.sub(rf"(?<!\w){name}\.\S+", "#", reason)
    return re.sub(r"\d+", "#", reason)


def _places(faults: Sequence[Fault]) -> str:
    """Say where examples of a fault are."""
    keys = [repr(fault.key) for fault in faults if fault.key is not None]
    shards = list(dict.fromkeys(fault.shard for fault in faults))
    if keys and len(shards) == 1:
        return f"{' and '.join(keys)} in {shards[0]}"
    return " and ".join(
        f"in {fault.shard}" if fault.key is None else f"{fault.key!r} in {fault.shard}"
        for fault in faults
    )


def summarize(faults: Iterable[Fault]) -> str:
    """Count faults by reason, most common first, with two examples each."""
    return Tally(faults).summary()


def check_budget(
    faults: Iterable[Fault] | Tally,
    samples: int,
    shards: int,
    budget: float,
    ledger: object = None,
) -> None:
    """Refuse data of which more than an allowed fraction is broken.

    Args:
        faults: The faults. Those of shards and samples count; passing faults and notes do not. A
            tally counts each fault that was added to it.
        samples: Number of samples, or of samples seen so far.
        shards: Number of shards, or of shards seen so far.
        budget: Allowed fraction, in [0, 1]. Ten broken samples are always allowed.
        ledger: File that lists all faults, for the message.

    Raises:
        BudgetError: A larger fraction is broken.
    """
    tally = faults if isinstance(faults, Tally) else Tally(_Once().new(faults))
    broken, lost = tally.samples, len(tally.shards)
    if lost <= budget * shards and (broken <= _FREE or broken <= budget * samples):
        return
    where = "" if ledger is None else f" All are in {ledger}."
    raise BudgetError(
        f"The data is more broken than data.error_budget={budget:g} allows: {lost} of {shards} "
        f"shards, {broken} of {samples} samples. {tally.summary(kinds=('shard', 'sample'))}."
        f"{where} Repair the data or raise the budget."
    )


class Ledger:
    """A jsonl file of faults, one line each, that a resumed run continues.

    A broken sample is listed once, however often the run meets it; a passing fault each time. Only
    counts, and a digest of each known fault, are held in memory.

    Args:
        path: The file. None = faults are only counted.
        position: Position at which the run resumes. Faults that a killed run wrote beyond it are
            removed, because they will occur again.

    Attributes:
        met: Counts of faults that the run itself met, without those found by indexing.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self.path = path
        self.met = Tally()
        self._once = _Once()
        if path is None:
            return
        if not path.parent.parent.is_dir():
            with side_file(path.parent):
                path.parent.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return
        before = (f for f in _read(path) if f.position is not None and f.position < position)
        with side_file(path), replacing(path) as beside, beside.open("wb") as file:
            for fault in self._once.new(before):
                self.met.add(fault)
                file.write(_line(fault))

    def write(self, faults: Iterable[Fault]) -> None:
        """Append new faults and sync them to disk."""
        new_faults = list(self._once.new(faults))
        for fault in new_faults:
            if fault.position is not None:
                self.met.add(fault)
        if new_faults and self.path is not None:
            self.path.parent.mkdir(exist_ok=True)  # but not the run's folder, if it was removed
            with self.path.open("ab") as file:
                file.writelines(map(_line, new_faults))
                file.flush()
                os.fsync(file.fileno())


class _Once:
    """Recognizes faults that were met before; stores 8 bytes for each."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def new(self, faults: Iterable[Fault]) -> Iterator[Fault]:
        """Yield new faults: permanent ones only once, passing ones always."""
        for fault in faults:
            if fault.kind == "passing":
                yield fault
                continue
            identity = repr((fault.kind, fault.shard, fault.key)).encode()
            mark = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big")
            if mark not in self._known:
                self._known.add(mark)
                yield fault


def read_ledger(path: Path) -> list[Fault]:
    """Read a ledger; lines that are not faults, such as a truncated last line, are skipped.

    Raises:
        ValueError: The path is not a file, or cannot be read.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Fault]:
    strange = 0
    with open_regular(path) as (file, _):
        while line := file.readline(_LONGEST_LINE):
            complete = line.endswith(b"\n")
            try:
                fault = as_fault(json.loads(line)) if complete else None
            except (ValueError, RecursionError):
                fault = None
            if fault is not None:
                yield fault
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)
            strange += bool(line)  # a crash may truncate the last line
    if strange:
        warnings.warn(f"{path}: {strange} lines are not faults, and are skipped.", stacklevel=2)


def _line(fault: Fault) -> bytes:
    # Bytes of a reason that are not UTF-8 become JSON escapes.
    text = json.dumps(vars(fault), ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
