"""The one rule: what an axis splits, what is communicated along it, and what makes a layout illegal.

A letter stands in both operands (contracted), in one operand and the product (rows, columns), or in all three
(batched). A mesh axis splits the one letter on which *every* tensor that carries the letter has the axis. The tensor
that lacks the letter is the one communicated along that axis: gathered where it is read, reduced where it is produced.
It may store the axis on a letter of its own (all-gather, reduce-scatter) or not at all (nothing, all-reduce).

The letters that a convolution slides along stand in one tensor each, and no axis splits them: every output reads its
neighbours' inputs. They may store an axis like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardgrad.layout.notation import Dim, Notation, TensorSpec


class Illegal(Exception):
    """Why a layout is refused, and where: terse. `Layout` adds the text, a caret and the nearest legal layouts."""

    def __init__(self, why: str, tensor: str, letter: str | None = None, axis: str | None = None) -> None:
        super().__init__(why)
        self.why, self.tensor, self.letter, self.axis = why, tensor, letter, axis


@dataclass(frozen=True, slots=True)
class Reading:
    """What the rule reads from a legal layout.

    splits: for each axis, the letter it splits.
    rows, contracted, columns, batched: the letters by role, in the order in which the tensors list them.
    bias: the bias as written, or the default one: the product's column letters, split by the axes that split them.
    """

    splits: dict[str, str]
    rows: tuple[str, ...]
    contracted: tuple[str, ...]
    columns: tuple[str, ...]
    batched: tuple[str, ...]
    bias: TensorSpec

    def compute_layout(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as a local product reads or makes it: sharded only by the axes that split its letters."""
        return spec.with_axes({d.letter: tuple(a for a in d.axes if self.splits[a] == d.letter) for d in spec.dims})

    def communicated_over(self, spec: TensorSpec) -> tuple[str, ...]:
        """The axes that split a letter which the tensor does not carry: it is communicated along these, no others."""
        return tuple(axis for axis, letter in self.splits.items() if letter not in spec.letters)


def read(layout: Notation) -> Reading:
    """Apply the rule.

    Raises:
        Illegal: the first thing found wrong.
    """
    lhs, rhs, out = layout.lhs, layout.rhs, layout.out
    _check_tensors(layout)
    rows = tuple(x for x in lhs.letters if x in out.letters and x not in rhs.letters)
    columns = tuple(x for x in rhs.letters if x in out.letters and x not in lhs.letters)
    contracted = tuple(x for x in lhs.letters if x in rhs.letters and x not in out.letters)
    batched = tuple(x for x in lhs.letters if x in rhs.letters and x in out.letters)
    operands = (lhs, rhs, out)
    axes = tuple(dict.fromkeys(a for tensor in operands for a in tensor.axes))
    splits = {axis: _letter_split_by(axis, operands, layout.spatial_letters) for axis in axes}
    _check_order(operands, splits)
    bias = layout.bias or _default_bias(layout, columns, splits)
    reading = Reading(splits, rows, contracted, columns, batched, bias)
    _check_bias(bias, out, splits)
    _check_marks(layout, reading)
    return reading


def _check_tensors(layout: Notation) -> None:
    names = [tensor.name for tensor in layout.tensors]
    for name in names:
        if names.count(name) > 1:
            raise Illegal(f"two tensors are called {name}", name)
    for tensor in layout.tensors:
        for letter in tensor.letters:
            if tensor.letters.count(letter) > 1:
                raise Illegal(f"letter {letter} stands twice in {tensor.name}", tensor.name, letter)
        for axis in tensor.axes:
            if tensor.axes.count(axis) > 1:
                raise Illegal(f"axis {axis} stands twice in {tensor.name}", tensor.name, axis=axis)
    three = (layout.lhs, layout.rhs, layout.out)
    spatial = layout.spatial
    for tensor in three:
        if len(tensor.dims) < spatial:
            raise Illegal(
                f"{tensor.name} has fewer dims than the {spatial} that a convolution slides along", tensor.name
            )
        for letter in tensor.letters[len(tensor.dims) - spatial :]:
            if sum(letter in other.letters for other in three) > 1:
                raise Illegal(
                    f"spatial letter {letter} of {tensor.name} (one of its last {spatial}) stands in another tensor: "
                    "kernel, stride and padding make three sizes of it, so each tensor has a letter of its own there, "
                    "such as h in X, i in W and p in Y",
                    tensor.name,
                    letter,
                )
    for tensor in three:
        for letter in tensor.letters[: len(tensor.dims) - spatial]:
            if sum(letter in other.letters for other in three) == 1:
                role = "summed away without a partner" if tensor is not layout.out else "made from nothing"
                raise Illegal(
                    f"letter {letter} stands in {tensor.name} alone, so it would be {role}: a letter stands in two "
                    "of the three tensors, or in all three",
                    tensor.name,
                    letter,
                )


def _letter_split_by(axis: str, tensors: tuple[TensorSpec, ...], spatial: tuple[str, ...]) -> str:
    """The one letter on which all its carriers have the axis. (Two such letters would meet in one tensor.)"""
    for letter in dict.fromkeys(t.letter_with(axis) for t in tensors):
        if (
            letter
            and letter not in spatial
            and all(t.letter_with(axis) == letter for t in tensors if letter in t.letters)
        ):
            return letter
    holder = next(t for t in tensors if t.letter_with(axis))
    letter = holder.letter_with(axis)
    if letter in spatial:
        others = dict.fromkeys(x for t in tensors for x in t.letters if x not in spatial)
        raise Illegal(
            f"axis {axis} splits no letter: {holder.name} has it on {letter}, which the convolution slides along. A "
            "window reaches into the neighbour's part there, so ranks would have to exchange borders (halos), which is "
            f"not done; {holder.name} may only store {axis} on {letter} while {axis} splits a letter that "
            f"{holder.name} lacks. Split one of {', '.join(others)}",
            holder.name,
            letter,
            axis,
        )
    other = next(t for t in tensors if letter in t.letters and t.letter_with(axis) != letter)
    elsewhere = other.letter_with(axis)
    does = f"has {axis} on {elsewhere} instead" if elsewhere else f"does not have {axis} there"
    raise Illegal(
        f"axis {axis} splits no letter: {holder.name} has it on {letter}, but {other.name}, which also carries "
        f"{letter}, {does}. An axis splits a letter in every tensor that carries it; only the tensor that lacks "
        "the letter may store the axis elsewhere",
        holder.name,
        letter,
        axis,
    )


def _check_order(tensors: tuple[TensorSpec, ...], splits: dict[str, str]) -> None:
    seen: dict[str, tuple[str, tuple[str, ...]]] = {}
    for tensor in tensors:
        for dim in tensor.dims:
            splitting = tuple(axis for axis in dim.axes if splits[axis] == dim.letter)
            for axis, minor in zip(dim.axes, dim.axes[1:]):
                if axis not in splitting and minor in splitting:
                    raise Illegal(
                        f"on {dim} of {tensor.name}, {axis} only stores (it splits {splits[axis]}) but stands before "
                        f"{minor}, which splits {dim.letter}: splitting axes come first",
                        tensor.name,
                        dim.letter,
                        axis,
                    )
            other, order = seen.setdefault(dim.letter, (tensor.name, splitting))
            if order != splitting:
                raise Illegal(
                    f"{tensor.name} splits {dim.letter} as {Dim(dim.letter, splitting)}, {other} as "
                    f"{Dim(dim.letter, order)}: all carriers list the axes that split a letter in one order",
                    tensor.name,
                    dim.letter,
                )


def _default_bias(layout: Notation, columns: tuple[str, ...], splits: dict[str, str]) -> TensorSpec:
    taken = {tensor.name for tensor in layout.tensors}
    name = next(n for n in ("B", "bias", "bias_") if n not in taken)
    dims = (d for d in layout.out.dims if d.letter in columns)
    return TensorSpec(name, tuple(Dim(d.letter, tuple(a for a in d.axes if splits[a] == d.letter)) for d in dims))


def _check_bias(bias: TensorSpec, out: TensorSpec, splits: dict[str, str]) -> None:
    for dim in bias.dims:
        if dim.letter not in out.letters:
            raise Illegal(
                f"the bias {bias.name} carries {dim.letter}, which {out.name} does not", bias.name, dim.letter
            )
        for axis in dim.axes:
            if axis not in splits:
                raise Illegal(
                    f"axis {axis} stands only in the bias {bias.name}, where it splits nothing",
                    bias.name,
                    dim.letter,
                    axis,
                )


def _check_marks(layout: Notation, reading: Reading) -> None:
    out = layout.out
    for tensor in layout.tensors:
        summed: tuple[str, ...]
        if tensor is layout.bias:
            summed = tuple(a for d in out.dims if d.letter not in tensor.letters for a in d.axes)
        else:
            summed = reading.communicated_over(tensor)
        marks = (*tensor.partial, *tensor.grad_partial)
        for axis in marks:
            if marks.count(axis) > 1:
                raise Illegal(f"{axis} stands twice in the braces of {tensor.name}", tensor.name)
            what = tensor.name if tensor is out else f"d{tensor.name}"
            if axis in tensor.axes:
                raise Illegal(
                    f"{tensor.name} is sharded over {axis} on {tensor.letter_with(axis)}, so {what} is complete there: "
                    f"it cannot be left partial over {axis} as well",
                    tensor.name,
                    axis=axis,
                )
            if axis not in summed:
                over = ", ".join(summed) or "no axis"
                raise Illegal(
                    f"{{{axis}}} leaves a sum over {axis} to the caller, but {what} is no sum over {axis} "
                    f"(it is summed over {over})",
                    tensor.name,
                    axis=axis,
                )
