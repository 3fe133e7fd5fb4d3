"""Calls with wrong kinds of arguments, told by the argument's name: looked into only once a call has failed."""

from __future__ import annotations

import collections.abc
import dis
import inspect
import types
import typing
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from shardgrad.errors import ShapeError, shorten

F = TypeVar("F", bound=Callable[..., Any])

_HERE = str(Path(__file__).parent)
_RAISE = dis.opmap["RAISE_VARARGS"]
_WRONG_VALUES = (LookupError, AttributeError, ArithmeticError, TypeError)
_NUMBERS: dict[type, type] = {int: Integral, float: Real}


def told(function: F) -> F:
    """Decorate a public function that is not called at every step: what fails because an argument is of another kind
    than its annotation says is a TypeError that names the argument."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            explain(error, function, args, kwargs, kernels=True)
            raise

    return call  # type: ignore[return-value]


class TellingType(type):
    """The type of classes whose constructor is `told`."""

    @property
    def __signature__(cls) -> inspect.Signature:
        of_init = inspect.signature(cls.__init__)  # type: ignore[misc]
        return of_init.replace(parameters=list(of_init.parameters.values())[1:], return_annotation=None)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            explain(error, cls.__init__, (cls, *args), kwargs, cls.__name__, kernels=True)  # type: ignore[misc]
            raise


def explain(
    error: Exception,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str = "",
    *,
    kernels: bool = False,
) -> None:
    """Raise what says better why a call failed, if anything does: nothing where shardgrad raised the error on purpose,
    or where every argument is of its kind and the error is not about an index or a number.

        except Exception as error:  # costs nothing where nothing fails
            explain(error, function, args, kwargs)
            raise

    Args:
        args: with `self`, of a method. name: of the function in messages; its own if empty.
        kernels: whether what torch's operations say of a tensor's shape or dtype is told so too.

    Raises:
        TypeError: an argument is of another kind than its annotation, or there is none of that name.
        ShapeError: an index or a number is out of its range, or a tensor is none that the function takes.
    """
    if type(error).__module__.startswith("shardgrad") or on_purpose(error):
        return
    name = name or function.__qualname__
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError as wrong:
        raise TypeError(f"{name}: {wrong}") from error
    hints = _hints(function)
    where = hints.pop("where", {})
    for argument, value in [*given.items(), *given.get("where", {}).items()]:
        hint = hints.get(argument, where.get(argument, Any))
        misfit = None if argument in ("self", "where") else _misfit(value, hint)
        if misfit is not None:
            raise TypeError(
                f"{name}: {argument} must be {_words(hint)}, not {_kind(value)}{_remedy(*misfit, value)}"
            ) from error
    plain = type(error) in (RuntimeError, NotImplementedError) or isinstance(error, ValueError)
    refused = kernels and plain and "memory" not in str(error)
    if (isinstance(error, _WRONG_VALUES) or refused) and name not in _OF_USERS:
        listed = ", ".join(_listed(given)) or "the call"
        raise ShapeError(f"{name}: {shorten(str(error))}: look at {listed}") from error


_OF_USERS = (
    "verify",
    "verify_exact",
    "per_piece",
    "parallelize",
)  # which call what the user wrote, whose errors are the user's


def on_purpose(error: BaseException) -> bool:
    """Whether a line of shardgrad raised it, and did not merely come upon it."""
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    if entry is None or isinstance(error, AssertionError):
        return False
    code = entry.tb_frame.f_code
    return code.co_filename.startswith(_HERE) and code.co_code[entry.tb_lasti] == _RAISE


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that can be read where the function stands; of **where, those of its keywords."""
    function = inspect.unwrap(function)
    found = {}
    for name, text in getattr(function, "__annotations__", {}).items():
        try:
            hint = eval(text, function.__globals__) if isinstance(text, str) else text
        except Exception:  # a name for type checkers alone
            continue
        if typing.get_origin(hint) is typing.Unpack:
            (keywords,) = typing.get_args(hint)
            found[name] = {key: _evaluated(one, keywords) for key, one in keywords.__annotations__.items()}
        else:
            found[name] = hint
    return found


def _evaluated(hint: Any, owner: type) -> Any:
    text = getattr(hint, "__forward_arg__", hint)
    try:
        return eval(text, vars(inspect.getmodule(owner))) if isinstance(text, str) else text
    except Exception:
        return Any


def _misfit(value: Any, hint: Any) -> tuple[Any, Any] | None:
    """The part of a value that is not of its kind, and the kind that it should be; None if there is none, or it cannot
    be said."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, dict):
        return None
    if origin is typing.Annotated:
        return _misfit(value, of[0] if of[0] is not Any else of[1])
    if isinstance(hint, TypeVar):
        return None if hint.__bound__ is None else _misfit(value, hint.__bound__)
    if origin in (typing.Union, types.UnionType):
        parts = [_misfit(value, one) for one in of]
        return None if None in parts else next(part for part in parts if part is not None)
    if origin is typing.Literal:
        return None if any(value is one or (type(value) is type(one) and value == one) for one in of) else (value, hint)
    if origin is None:
        return None if _is_a(value, type(None) if hint is None else hint) else (value, hint)
    if origin is collections.abc.Callable:
        return None if callable(value) else (value, hint)
    try:
        if not isinstance(value, origin) or (isinstance(value, str | bytes) and origin is not str):
            return value, hint
    except TypeError:
        return None
    if hasattr(value, "dtype") and hasattr(value, "shape") and "Tensor" not in _words(hint):  # of numbers alone
        return value, hint
    if isinstance(value, dict) and len(of) == 2:
        pairs = [(one, kind) for item in value.items() for one, kind in zip(item, of)]
    elif isinstance(value, tuple) and origin is tuple and of[1:] != (...,):
        pairs = list(zip(value, of)) if len(value) == len(of) else [(value, int)]
    elif isinstance(value, list | tuple | set | frozenset):
        pairs = [(one, of[0]) for one in value]
    else:
        pairs = []
    return next((found for one, kind in pairs if (found := _misfit(one, kind)) is not None), None)


def _is_a(value: Any, kind: Any) -> bool:
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    try:
        fits = isinstance(value, kind)
    except TypeError:  # a protocol, or no class
        return True
    return fits and not (getattr(kind, "__name__", "") == "Tensor" and unusual(value))


def unusual(tensor: Any) -> str:
    """In what way a tensor is none of plain numbers in memory."""
    if hasattr(tensor, "to_local"):
        return "DTensor"
    if tensor.is_nested:
        return "nested tensor"
    if tensor.is_quantized:
        return "quantized tensor"
    if tensor.is_meta:
        return "tensor without values, on meta"
    return "" if str(tensor.layout) == "torch.strided" else f"{str(tensor.layout).removeprefix('torch.')} tensor"


_REMEDIES = {  # by what was given, and what should have been
    ("ndarray", "Tensor"): "torch.from_numpy(…)",
    ("DTensor", "Tensor"): "pass its local shard, .to_local()",
    ("nested tensor", "Tensor"): "torch.nested.to_padded_tensor(…, 0.0)",
    ("quantized tensor", "Tensor"): "pass .dequantize()",
    ("sparse_coo tensor", "Tensor"): "pass .to_dense()",
    ("sparse_csr tensor", "Tensor"): "pass .to_dense()",
    ("DeviceMesh", "Mapping"): "pass the number of ranks of each axis, as {'tp': 2}",
}
_PASS = {
    "Tensor": "pass a torch.Tensor",
    "dtype": "pass one of torch's, as torch.float32",
    "DeviceMesh": "make one with torch.distributed.init_device_mesh(…, mesh_dim_names=…)",
    "Module": "pass the model, or the part of it that is meant",
    "TensorSpec": "take it from a layout, as layout['W']",
}


def _kind(value: Any) -> str:
    special = unusual(value) if hasattr(value, "is_quantized") and hasattr(value, "layout") else ""
    if special or hasattr(value, "shape"):
        return f"a {special or type(value).__name__}"
    return f"{type(value).__name__} {shorten(repr(value) if isinstance(value, str) else value)}"


def _remedy(part: Any, kind: Any, value: Any) -> str:
    named = _kind(part).removeprefix("a ")
    wanted = getattr(kind, "__name__", "")
    text = _REMEDIES.get((named, wanted), "") or _PASS.get(wanted, "")
    if text:
        return f": {text}"
    return "" if part is value else f" ({_words(kind)} is meant, and this has {named})"


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        return _words(typing.get_args(hint)[1])
    if isinstance(hint, TypeVar):
        return _words(hint.__bound__)
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    for module in (
        "typing.",
        "collections.abc.",
        "torch.nn.modules.module.",
        "torch.distributed.device_mesh.",
        "torch.",
    ):
        text = text.replace(module, "")
    return text


def _listed(given: dict[str, Any]) -> list[str]:
    found = []
    for name, value in given.items():
        if name not in ("self", "where"):
            shape, dtype = getattr(value, "shape", None), str(getattr(value, "dtype", "")).removeprefix("torch.")
            tensor = f"{name}: {dtype} {list(shape)}" if isinstance(shape, tuple) else ""
            found.append(tensor or f"{name} = {shorten(value, 60)}")
    return found[:6]
