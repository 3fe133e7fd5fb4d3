"""On a rank: an exception as text, with enough of the locals to be understood from another process."""

from __future__ import annotations

import contextlib
import reprlib
import signal
import sysconfig
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

_MACHINERY = (str(Path(__file__).parent), "<frozen importlib")
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_FRAMES_WITH_LOCALS = 3
_VALUES_OF_A_FRAME = 40
_TEXT_SECONDS, _REPR_SECONDS = 5.0, 0.5
_DULL = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 8
_short.maxstring = _short.maxother = 200


def describe(error: BaseException) -> tuple[str, str, str]:
    """Returns one line, the traceback from the user's first frame on, and that code's local variables."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename.startswith(_MACHINERY):
        start = start.tb_next
    # With nothing of the user's left, the way the function was called is at fault: keep every frame.
    error = error.with_traceback(start or error.__traceback__)
    try:
        with _time_limit(_TEXT_SECONDS):
            told = traceback.TracebackException.from_exception(error)  # asks for str(error) once, which may raise
            lines, text = list(told.format_exception_only()), "".join(told.format())
    except _TooSlowError:
        lines = [f"{type(error).__name__}, whose text took more than {_TEXT_SECONDS:g} s"]
        text = "".join([*traceback.format_tb(error.__traceback__), *lines])
    summary = next((line for line in lines if not line.startswith(" ")), lines[0]).splitlines()[0]
    return summary, text, _variables(start)


class _TooSlowError(BaseException):
    """Raised in the middle of somebody's repr: one that catches every `Exception` lets it pass."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends what is inside after so long, on the thread that may have signals; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _variables(entry: types.TracebackType | None) -> str:
    frames = []
    while entry is not None:
        frame = entry.tb_frame
        at_module_level = frame.f_locals is frame.f_globals
        library = frame.f_code.co_filename.startswith((*_MACHINERY, *_LIBRARIES))
        if not at_module_level and not library:
            frames.append((frame, entry.tb_lineno))
        entry = entry.tb_next
    blocks = []
    for frame, line in frames[-_FRAMES_WITH_LOCALS:]:
        named = [
            (name, value)
            for name, value in frame.f_locals.items()
            if not name.startswith(("@", "__")) and not isinstance(value, _DULL)
        ]
        values = [f"    {name} = {_shortened(value)}" for name, value in named[:_VALUES_OF_A_FRAME]]
        values += [f"    and {len(named) - len(values)} more"] * (len(named) > len(values))
        if values:
            where = f"  {frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{line}"
            blocks.append("\n".join([where, *values]))
    return "\n".join(blocks)


def _shortened(value: object) -> str:
    """A repr on one line; a tensor's begins with its shape and dtype, which explain most failures."""
    try:
        if isinstance(value, bytes | bytearray):  # whose repr is four times as long
            value = value[: _short.maxother]
        with _time_limit(_REPR_SECONDS):
            text = " ".join(_short.repr(value).split())
            shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
            return text if shape is None or dtype is None else f"{list(shape)} {dtype} {text}"
    except _TooSlowError:
        return f"<{type(value).__name__}, whose repr took more than {_REPR_SECONDS:g} s>"
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
