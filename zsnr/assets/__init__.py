"""Files that the package ships."""

from pathlib import Path

_PREFIX = "asset:"


def resolve_asset(name: str) -> str:
    """Return the folder of "asset:NAME"; any other string as it is.

    Raises:
        ValueError: No such asset; the known ones are listed.
    """
    if not name.startswith(_PREFIX):
        return name
    folder = Path(__file__).parent / name.removeprefix(_PREFIX)
    if not folder.is_dir():
        known = sorted(
            p.name for p in Path(__file__).parent.iterdir() if (p / "config.json").exists()
        )
        raise ValueError(f"{name!r} is not shipped. Known: {', '.join(known) or 'none'}.")
    return str(folder)
