"""What is broken in the data: counted, written down, and stopped by a budget."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Literal

from zsnr.files import replacing, side_file
from zsnr.public import public_text, public_url
from zsnr.untrusted import open_regular, shown

_FREE = 10  # broken samples that no budget counts: one of the first three is no third of the data
_KINDS = ("shard", "sample", "passing", "note")
_MOST_REASONS, _MOST_LISTED = 1000, 5  # that are told apart, and that a summary lists
_LONGEST_LINE = 1 << 20  # bytes of a ledger's line


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong with the data.

    Args:
        kind: "shard" = a shard is missing or cut short, "sample" = a sample is broken for good,
            "passing" = a read failed and was tried again, "note" = nothing is broken, but a
            shard holds something that is not read.
        shard: Path or address; without passwords and signatures, and see `as_utf8`.
        key: The sample's. None = the whole shard.
        reason: One line.
        position: The sample's place in the run that met it. None = found by indexing.
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
    """Write bytes that are not UTF-8, which Python has as surrogates, as their codes."""
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
        raise ValueError(f"{shown(value)} stands where a fault should")
    for name, allowed in kinds.items():
        if type(value.get(name)) not in allowed:
            raise ValueError(f"a fault's {name} is {shown(value.get(name))}")
    if value["kind"] not in _KINDS:
        raise ValueError(f"a fault's kind is {shown(value['kind'])}")
    return Fault(**value)


class BudgetError(ValueError):
    """More of the data is broken than the run may bear."""


class PackedFaults(Collection[Fault]):
    """Faults that stay packed until one looks: some 10 bytes each, where an object has 400.

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
        return any(each == fault for each in self)


class Tally:
    """Running counts of faults: by reason, with an example each, however many there are.

    Attributes:
        samples: Broken samples.
        shards: Lost shards.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.samples = 0
        self.shards: set[str] = set()
        self._groups: dict[tuple[str, str], tuple[int, Fault]] = {}
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Count a fault."""
        if fault.kind == "sample":
            self.samples += 1
        elif fault.kind == "shard":
            self.shards.add(fault.shard)
        # "44 bytes not processed" and "23 bytes" are one reason.
        group = (fault.kind, re.sub(r"\d+", "#", fault.reason))
        if group not in self._groups and len(self._groups) >= _MOST_REASONS:
            group = (fault.kind, "")
        count, first = self._groups.get(group, (0, fault))
        self._groups[group] = count + 1, first

    def summary(self, kinds: Sequence[str] = _KINDS) -> str:
        """List the reasons, the commonest first, with an example each."""
        groups = [(n, first) for (kind, _), (n, first) in self._groups.items() if kind in kinds]
        lines = []
        for count, first in sorted(groups, key=lambda group: group[0], reverse=True)[:_MOST_LISTED]:
            where = first.shard if first.key is None else f"{first.shard}, sample {first.key!r}"
            lines.append(f"{count} x {first.kind}: {first.reason} (first: {where})")
        if len(groups) > _MOST_LISTED:
            lines.append(f"and {len(groups) - _MOST_LISTED} other reasons")
        return "; ".join(lines)


def summarize(faults: Iterable[Fault]) -> str:
    """Count faults by reason, the commonest first, with an example each."""
    return Tally(faults).summary()


def check_budget(
    faults: Iterable[Fault] | Tally,
    samples: int,
    shards: int,
    budget: float,
    ledger: object = None,
) -> None:
    """Refuse data of which more than a share is broken.

    Args:
        faults: Those of shards and samples count, passing ones and notes do not. A tally counts
            each fault that it was given.
        samples: How many there are, or were seen.
        shards: Likewise.
        budget: The share, in [0, 1]. Ten broken samples are always free.
        ledger: Where all faults are written, for the message.

    Raises:
        BudgetError: More is broken.
    """
    tally = faults if isinstance(faults, Tally) else Tally(_Once().new(faults))
    broken, lost = tally.samples, len(tally.shards)
    if lost <= budget * shards and (broken <= _FREE or broken <= budget * samples):
        return
    where = "" if ledger is None else f" All are in {ledger}."
    raise BudgetError(
        f"The data is more broken than data.error_budget={budget:g} allows: {lost} of {shards} "
        f"shards, {broken} of {samples} samples. {tally.summary(kinds=('shard', 'sample'))}."
        f"{where} Mend the data or raise the budget."
    )


class Ledger:
    """A jsonl file of faults, one line each, that a resumed run continues.

    A broken sample stands there once, however often it is met; a passing fault each time. In memory
    are counts and what tells known faults from new ones.

    Args:
        path: The file. None = only counted.
        position: Where the run resumes; what a killed run wrote beyond it happens again and is
            removed.

    Attributes:
        met: Counts of what the run itself met, not of what indexing found.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self.path = path
        self.met = Tally()
        self._once = _Once()
        if path is None:
            return
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
        """Append what is new, and see that it is on disk."""
        new = list(self._once.new(faults))
        for fault in new:
            if fault.position is not None:
                self.met.add(fault)
        if new and self.path is not None:
            self.path.parent.mkdir(exist_ok=True)  # not the folder of a run, should it be gone
            with self.path.open("ab") as file:
                file.writelines(map(_line, new))
                file.flush()
                os.fsync(file.fileno())


class _Once:
    """Tells faults that were not met before; keeps 8 bytes of each."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def new(self, faults: Iterable[Fault]) -> Iterator[Fault]:
        """Leave out what is broken for good and was met before; passing faults are always new."""
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
    """Read a ledger; lines that are not faults are left out, such as one that a crash cut short.

    Raises:
        ValueError: It is not a file, or cannot be read.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Fault]:
    strange = 0
    with open_regular(path) as (file, _):
        while line := file.readline(_LONGEST_LINE):
            whole = line.endswith(b"\n")
            try:
                fault = as_fault(json.loads(line)) if whole else None
            except (ValueError, RecursionError):
                fault = None
            if fault is not None:
                yield fault
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)
            strange += bool(line)  # a crash may cut the last line short
    if strange:
        warnings.warn(f"{path}: {strange} lines are not faults, and are left out.", stacklevel=2)


def _line(fault: Fault) -> bytes:
    # Of a reason that is not UTF-8 the odd bytes become JSON's own escapes.
    text = json.dumps(vars(fault), ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
