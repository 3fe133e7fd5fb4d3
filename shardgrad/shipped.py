"""The configurations that come with the package, by name, from any folder."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"  # in a checkout a link to configs/


def names(under: str = "") -> list[str]:
    """Of those in a folder of `configs`: `quickstart`, or `scaling/strong` under "scaling"."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in (FOLDER / under).glob("*.yaml"))


def find(path: str | Path) -> Path:
    """The file that is meant: the path itself, or where there is none, the shipped configuration of that name
    ("quickstart", "scaling/strong"; also as the documentation writes it, "configs/quickstart.yaml")."""
    given = Path(path)
    if given.exists() or given.is_absolute():
        return given
    here = FOLDER / given.as_posix().removeprefix("configs/")
    named = here if here.suffix == ".yaml" else here.with_name(f"{here.name}.yaml")
    return named if here.name and named.is_relative_to(FOLDER) and named.is_file() else given


def hint(path: str | Path) -> str:
    """What to add to the message that there is no such file: the nearest name of a shipped one, or all;
    nothing for a path from the root."""
    if Path(path).is_absolute():
        return ""
    known = [*names(), *names("scaling")]
    near = get_close_matches(Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml"), known, n=1)
    return f"; the nearest one that is shipped is {near[0]}" if near else f"; those shipped are {', '.join(known)}"


def purpose(name: str) -> str:
    """What a shipped configuration is for: its first line."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip(" .:")
