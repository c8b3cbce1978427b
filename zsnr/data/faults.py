"""What is broken in the data: counted, written down, and stopped by a budget."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from zsnr.data.storage import public_url
from zsnr.files import replacing

_FREE = 10  # broken samples that no budget counts: one of the first three is no third of the data


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong with the data.

    Args:
        kind: "shard" = a shard is missing or cut short, "sample" = a sample is broken for good,
            "passing" = a read failed and was tried again.
        shard: Path or address; without passwords and signatures.
        key: The sample's. None = the whole shard.
        reason: One line.
        position: The sample's place in the run that met it. None = found by indexing.
    """

    kind: Literal["shard", "sample", "passing"]
    shard: str
    key: str | None
    reason: str
    position: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shard", public_url(self.shard))


class BudgetError(ValueError):
    """More of the data is broken than the run may bear."""


def summarize(faults: Iterable[Fault], most: int = 5) -> str:
    """Count faults by reason, the commonest first, with an example each."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:  # "44 bytes not processed" and "23 bytes" are one reason
        groups.setdefault((fault.kind, re.sub(r"\d+", "#", fault.reason)), []).append(fault)
    lines = []
    for members in sorted(groups.values(), key=len, reverse=True)[:most]:
        first = members[0]
        where = first.shard if first.key is None else f"{first.shard}, sample {first.key!r}"
        lines.append(f"{len(members)} x {first.kind}: {first.reason} (first: {where})")
    if len(groups) > most:
        lines.append(f"and {len(groups) - most} other reasons")
    return "; ".join(lines)


def check_budget(
    faults: Iterable[Fault], samples: int, shards: int, budget: float, ledger: object = None
) -> None:
    """Refuse data of which more than a share is broken.

    Args:
        faults: Those of shards and samples count, passing ones do not.
        samples: How many there are, or were seen.
        shards: Likewise.
        budget: The share, in [0, 1]. Ten broken samples are always free.
        ledger: Where all faults are written, for the message.

    Raises:
        BudgetError: There are more; says which.
    """
    lasting = {(f.kind, f.shard, f.key): f for f in faults if f.kind != "passing"}.values()
    broken = sum(fault.kind == "sample" for fault in lasting)
    lost = len({fault.shard for fault in lasting if fault.kind == "shard"})
    if lost <= budget * shards and (broken <= _FREE or broken <= budget * samples):
        return
    where = "" if ledger is None else f" All are in {ledger}."
    raise BudgetError(
        f"The data is more broken than data.error_budget={budget:g} allows: {lost} of {shards} "
        f"shards, {broken} of {samples} samples. {summarize(lasting)}.{where} Mend the data or "
        "raise the budget."
    )


class Ledger:
    """A jsonl file of faults, one line each, that a resumed run goes on with.

    A broken sample stands there once, however often it is met; a passing fault each time.

    Args:
        path: The file. None = only counted.
        position: Where the run goes on; what a killed run wrote beyond it happens again, and goes.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self.path = path
        self.faults: list[Fault] = []
        if path is not None and path.is_file():
            found = read_ledger(path)
            self.faults = [f for f in found if f.position is not None and f.position < position]
            with replacing(path) as beside:
                beside.write_text("".join(map(_line, self.faults)), encoding="utf-8")
        self._known = {_identity(fault) for fault in self.faults}

    def write(self, faults: Iterable[Fault]) -> None:
        """Append what is new, and see that it is on disk."""
        new = []
        for fault in faults:
            if fault.kind == "passing" or _identity(fault) not in self._known:
                self._known.add(_identity(fault))
                new.append(fault)
        if not new:
            return
        self.faults += new
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, new)))
                file.flush()
                os.fsync(file.fileno())


def read_ledger(path: Path) -> list[Fault]:
    """Read a ledger; a last line that a crash cut short is left out."""
    text = path.read_text(encoding="utf-8")
    return [Fault(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def _line(fault: Fault) -> str:
    return json.dumps(asdict(fault), ensure_ascii=False) + "\n"


def _identity(fault: Fault) -> tuple[str, str, str | None]:
    return fault.kind, fault.shard, fault.key
