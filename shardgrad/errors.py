"""Every error that shardgrad raises on purpose."""


class LayoutError(ValueError):
    """A layout that cannot be read, or that no choice of collectives could compute."""


class ShapeError(ValueError):
    """A local tensor whose shape, dtype or device does not fit its layout, or its peers'."""


class MeshError(ValueError):
    """A device mesh that lacks an axis, or does not contain this rank."""


class DisagreementError(RuntimeError):
    """Ranks of one mesh axis came to the same operation with different layouts, shapes or dtypes."""


class CollectiveError(RuntimeError):
    """A collective failed or timed out; says which, of what, over which ranks, seen from which rank."""


class VerificationError(RuntimeError):
    """What was checked is wrong: an element outside of its bound, replicas that differ, a number that is not finite."""


def install(extra: str) -> str:
    """The command that installs what an extra of shardgrad's needs: from a checkout, for it is on no index yet."""
    return f"in a checkout of shardgrad by  pip install -e '.[{extra}]'"


def shorten(value: object, most: int = 200) -> str:
    """Somebody's text, or the repr of another value, as a message repeats it: at most `most` characters, and how many
    there were.

    A repr that fails is told as such: no message is lost for what it is about.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= most else f"{text[: most - 30]}… ({len(text):,} characters)"
