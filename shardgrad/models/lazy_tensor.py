"""A tensor that lies somewhere else, of which parts are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

At = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A shape, and `read(slices)`: the tensor at one slice, with a start and a stop, for each of its dims."""

    shape: tuple[int, ...]
    read: Callable[[At], Tensor]

    def everything(self) -> At:
        return tuple(slice(0, size) for size in self.shape)


def stack(tensors: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """As torch.stack; of the tensors, only those in the slice are read.

    Raises:
        ValueError: their shapes differ.
    """
    first = tensors[0].shape
    for at, tensor in enumerate(tensors):
        if tensor.shape != first:
            raise ValueError(f"to stack, the first tensor has shape {first}, number {at} {tensor.shape}")

    def read(at: At) -> Tensor:
        inner = at[:dim] + at[dim + 1 :]
        chosen = tensors[at[dim].start : at[dim].stop]
        if not chosen:
            nothing = tensors[0].read(tuple(slice(0, 0) for _ in inner))
            return nothing.new_empty([one.stop - one.start for one in at])
        return _filled(((one.read(inner).unsqueeze(dim), 1) for one in chosen), dim, len(chosen))

    return LazyTensor((*first[:dim], len(tensors), *first[dim:]), read)


def concatenate(tensors: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """As torch.cat.

    Raises:
        ValueError: their shapes differ in another dim.
    """
    shapes = [tensor.shape for tensor in tensors]
    if len({(shape[:dim], shape[dim + 1 :]) for shape in shapes}) > 1:
        raise ValueError(f"tensors to concatenate along dim {dim} have shapes {', '.join(map(str, shapes))}")

    def read(at: At) -> Tensor:
        begin, pieces = 0, []
        for tensor, shape in zip(tensors, shapes):
            start, stop = max(at[dim].start, begin) - begin, min(at[dim].stop, begin + shape[dim]) - begin
            if start < stop:
                pieces.append((tensor, slice(start, stop)))
            begin += shape[dim]
        if len(pieces) <= 1:
            tensor, run = pieces[0] if pieces else (tensors[0], slice(0, 0))
            return tensor.read((*at[:dim], run, *at[dim + 1 :]))
        parts = ((one.read((*at[:dim], run, *at[dim + 1 :])), run.stop - run.start) for one, run in pieces)
        return _filled(parts, dim, at[dim].stop - at[dim].start)

    return LazyTensor((*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :]), read)


def chunk(tensor: LazyTensor, chunks: int, dim: int) -> list[LazyTensor]:
    """As torch.chunk."""
    size = tensor.shape[dim]
    step = -(-size // chunks)

    def part(begin: int, end: int) -> LazyTensor:
        def read(at: At) -> Tensor:
            moved = slice(at[dim].start + begin, at[dim].stop + begin)
            return tensor.read((*at[:dim], moved, *at[dim + 1 :]))

        return LazyTensor((*tensor.shape[:dim], end - begin, *tensor.shape[dim + 1 :]), read)

    return [part(begin, min(begin + step, size)) for begin in range(0, size, step)]


def transpose(tensor: LazyTensor, first: int, second: int) -> LazyTensor:
    """As torch.transpose."""

    def swapped(sizes: Sequence[object]) -> list[object]:
        made = list(sizes)
        made[first], made[second] = made[second], made[first]
        return made

    return LazyTensor(
        tuple(swapped(tensor.shape)),  # type: ignore[arg-type]
        lambda at: tensor.read(tuple(swapped(at))).transpose(first, second),  # type: ignore[arg-type]
    )


def same_values(first: LazyTensor, second: LazyTensor, rows: int = 1024) -> bool:
    """Whether two tensors of one shape are equal, some rows at a time."""
    for start in range(0, first.shape[0] if first.shape else 1, rows):
        at = first.everything()
        if at:
            at = (slice(start, min(start + rows, first.shape[0])), *at[1:])
        one, other = first.read(at), second.read(at)
        if not one.equal(other.to(one.dtype)):
            return False
    return True


def _filled(pieces: Iterator[tuple[Tensor, int]], dim: int, size: int) -> Tensor:
    """Pieces beside each other along a dim: one is held at a time, next to what they are copied into."""
    out, begin = None, 0
    for piece, length in pieces:
        if out is None:
            out = piece.new_empty((*piece.shape[:dim], size, *piece.shape[dim + 1 :]))
        out.narrow(dim, begin, length).copy_(piece)
        begin += length
    assert out is not None
    return out
