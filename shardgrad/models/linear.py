"""A linear layer of somebody's model, its features stored as a plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from shardgrad.comm.adjoint import gather_replicated
from shardgrad.comm.mesh import view
from shardgrad.comm.pieces import refuse_exact_on
from shardgrad.errors import LayoutError
from shardgrad.layout.notation import Dim, TensorSpec
from shardgrad.layout.sizes import slab
from shardgrad.models.entrance import Entrance
from shardgrad.models.features import Features, Letters, written
from shardgrad.nn.features import MergedDim, Part, StoredOutput
from shardgrad.nn.heads import Heads
from shardgrad.nn.layer import Layer
from shardgrad.nn.parallel import Where
from shardgrad.nn.replicated import for_rows
from shardgrad.nn.sharding import ParamSharding


class FeatureLinear(Layer):
    """nn.Linear, or transformers' Conv1D, whose features are stored as a text says: `d -> h/tp,k`.

    Outside, features are one dim, as in the layer that it stands for; inside, each letter is one. The weight has the
    layer's name, shape and order of dims, of which a rank has its part.

    Args:
        features: how they are stored.
        sizes: the global size of each letter.
        bias: whether there is one.
        transposed: whether the weight is [in, out] (Conv1D), not [out, in].
        heads: where KV heads `g` are not those of this rank's query heads: which ones it computes. They are then stored
            whole, and it emits one for each of its query heads.
        entrance: where it takes its input together with others; None: by itself.
        spread: how many heads a rank without heads emits, to be dropped by the row parallel layer: most programs cannot
            view a tensor without elements.
        parallel, or mesh, axis, sequence_dim, …: as of `sg.Parallel`.

    Shapes: x [..., in features of this rank] → [..., out features of this rank].
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        features: Features,
        sizes: Mapping[str, int],
        bias: bool,
        *,
        transposed: bool = False,
        heads: Heads | None = None,
        entrance: Entrance | None = None,
        **where: Unpack[Where],
    ) -> None:
        super().__init__(where, reduce=entrance is None)
        self.entered = False  # whether x comes with its gradient summed by whoever made it; see `enter`
        self.features, self.transposed, self.entrance = features, transposed, entrance
        self.kind = features.kind(self.axis)
        self._whole = {part[0].letter for part in features.parts if self.kind == "column" and not _axes(part)}
        self.heads = heads if any("g/" in str(dim) for part in features.parts for dim in part) else None
        self._whole |= {"g"} if self.heads is not None else set()
        self.in_features = prod(sizes[dim.letter] for dim in features.into)
        self.out_features = sum(prod(sizes[dim.letter] for dim in part) for part in features.parts)
        self._declared: dict[str, list[ParamSharding]] = {"weight": [], "bias": []}
        products = {str(at): self._template(part) for at, part in enumerate(features.parts)}
        self.build(sizes, bias=bias, products=products, unknown=self._whole)
        for name, parts in self._declared.items():
            if parts:
                self._register(name, parts)
        for product in products:  # what `build` registers for a product without bias
            self._parameters.pop(f"{product}_bias", None)
        self._in = self._local(features.into)
        self._out = [self._local(part) for part in features.parts]
        if not bias:
            self.register_parameter("bias", None)

    # What Layer.build asks: the parts of a concatenation are products of one input, with pieces of one weight.

    def _template(self, part: Letters) -> str:
        into, out = (written(_symbols(letters, self.axis)) for letters in (self.features.into, self._used(part)))
        order = (into, out) if self.transposed else (out, into)
        x, y = (f"X[n,{into}]", f"Y[n/sp,{out}]") if self.kind == "row" else (f"X[n/sp,{into}]", f"Y[n,{out}]")
        return f"{x} W[{','.join(order)}] -> {y} + B[{out}]"

    def stored(self, spec: TensorSpec | None, *, vector: bool = False) -> Any:
        """As of `Layer`, and over the axes that the text stores features on."""
        if spec is None:
            return None
        own = {dim.letter: dim.axes for part in self.features.parts for dim in self._used(part)}
        own |= {dim.letter: dim.axes for dim in self.features.into}
        spec = spec.with_axes({dim.letter: own[dim.letter] for dim in spec.dims})
        if self.data is None or self.data.axis in spec.axes:
            return spec
        if self.data.shard_params and not vector:  # on one dim for all parts: an input letter
            free = max((dim for dim in self.features.into), key=lambda dim: self._sizes[dim.letter])
            return spec.with_axes({free.letter: (*own[free.letter], self.data.axis)})
        return self.data.storage(spec, self._sizes, vector=vector)

    def add(self, name: str, spec: TensorSpec, merged: tuple[int, ...] | None = None) -> None:
        part, kind = self.features.parts[int(name.partition("_")[0])], name.partition("_")[2]
        spec = spec.with_axes({dim.letter: () for dim in part if dim.letter in self._whole})
        sizes = [prod(self._sizes[dim.letter] for dim in letters) for letters in (part, self.features.into)]
        shape = tuple(sizes[:1] if kind == "bias" else sizes[::-1] if self.transposed else sizes)
        whole = tuple(self._sizes[letter] for letter in spec.letters)
        self._declared[kind].append(ParamSharding(spec, whole, self.mesh, None if shape == whole else shape))

    def _used(self, part: Letters) -> Letters:
        """A part's letters as the product has them. One that no axis shards, beside others that one shards (a KV head
        for all queries), is stored whole; ranks use it for heads of their own, so that its gradient is a sum."""
        if self.kind != "column" or _axes(part):
            return part
        return replace(part[0], axes=(self.axis,)), *part[1:]

    def enter(self) -> None:
        """From now on, leave the input's gradient unsummed: whoever made the input sums it."""
        if self.entrance is None and not self.entered:
            self._recipes = {x: replace(recipe, reduce=False) for x, recipe in self._recipes.items()}
            self._products.clear()
        self.entered = True

    def _biased(self, x: str) -> bool:
        return self.bias is not None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing: the values are those of the layer that this one stands for."""

    def _register(self, name: str, parts: Sequence[ParamSharding]) -> None:
        dim = 1 if name == "weight" and self.transposed else 0
        sharding = parts[0]
        if len(parts) > 1:
            shape = list(parts[0].global_shape)
            shape[dim] = sum(part.global_shape[dim] for part in parts)
            axes = tuple(dict.fromkeys(axis for part in parts for axis in part.spec.axes))
            dims = [Dim(letter) for letter in ("out", "in")[: len(shape)]][:: -1 if self.transposed else 1]
            dims[dim] = Dim("out", axes)
            spec = TensorSpec(name[0].upper(), tuple(dims), grad_partial=parts[0].spec.grad_partial)
            sharding = ParamSharding(spec, tuple(shape), self.mesh, parts=tuple(parts), dim=dim)
        self._shardings[name] = sharding
        device = view(self.mesh).device if self.parallel.device is None else self.parallel.device
        empty = torch.empty(sharding.local_shape, device=device, dtype=self.parallel.dtype)
        self.register_parameter(name, nn.Parameter(empty))
        lengths = [part.local_shape[dim] for part in parts] if len(parts) > 1 else []
        self._pieces = {**getattr(self, "_pieces", {}), name: (dim, lengths, [part.block()[1] for part in parts])}

    def _local(self, letters: Letters) -> list[int]:
        """This rank's size of each letter."""
        mesh_view = view(self.mesh)
        return [
            slab(
                self._sizes[dim.letter],
                [axis for axis in dim.axes if axis == self.axis],
                mesh_view.shape,
                mesh_view.coordinate,
            )[1]
            for dim in letters
        ]

    @property
    def leaves_sharded(self) -> bool:
        """Whether y differs between the ranks of the axis."""
        return (self.kind == "column" and not self.features.gathered) or self.sequence_dim is not None

    def stored_output(self) -> StoredOutput:
        """How y is stored, before anybody gathers it."""
        own = (self.axis,)
        queries = None if self.heads is None else self.heads.queries
        parts = []
        for letters in self.features.parts:
            dims = tuple(
                Dim(dim.letter, () if self.features.gathered else tuple(axis for axis in dim.axes if axis in own))
                for dim in letters
            )
            repeated = queries if any(dim.letter == "g" for dim in letters) else None
            sizes = tuple(self._sizes[dim.letter] for dim in letters)
            parts.append(Part(dims, sizes, repeated, spread=len(letters) > 1))
        return StoredOutput(MergedDim(tuple(parts)), own if self.sequence_dim is not None else ())

    # A call.

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y, its features in one dim."""
        instead = "what lies between its layers is the model's own, and knows no pieces; use shardgrad's layers"
        refuse_exact_on(self.mesh, None, "a model of sg.parallelize", instead)
        if self.entrance is not None and not self.entered:
            x = self.entrance(x)
        if 0 in self._in and x.shape[-1]:
            x = x.narrow(-1, 0, 0)  # what ranks without heads attend with
        elif x.shape[-1:] == (self.in_features,) and prod(self._in) != self.in_features:
            raise LayoutError(
                f"{self.features} gets x whole, {tuple(x.shape)}, not this rank's {prod(self._in)} features: the plan "
                f"lacks the layer before it, as 'd -> …/{self.axis}'"
            )
        x = x.unflatten(-1, self._in) if len(self._in) > 1 else x
        made = self.multiply("X", x, sequence_size, operands=self._operands())
        outs = [self._flat(y, x.dim() - len(self._in), at) for at, y in enumerate(made)]
        y = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return gather_replicated(y, self.mesh, self.axis, -1, size=self.out_features) if self.features.gathered else y

    def _operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """The pieces of the weight and the bias as products have them; of KV heads, those that this rank needs."""
        pieces = {name: self._split(name) for name in self._shardings}
        if self._whole:
            kv = [at for at, part in enumerate(self.features.parts) if any(dim.letter in self._whole for dim in part)]
            shared = [(name, at) for name in pieces for at in kv]
            axes = (self.axis,)
            used = for_rows([pieces[n][at] for n, at in shared], [self._parts(n)[at] for n, at in shared], axes)
            for (name, at), whole in zip(shared, used):
                pieces[name][at] = whole
                if self.heads is None:
                    continue
                place = next(i for i, dim in enumerate(self.features.parts[at]) if dim.letter == "g")
                place += len(self.features.into) if self.transposed and name == "weight" else 0
                pieces[name][at] = whole.narrow(place, self.heads.first_kv, self.heads.count_kv)
        return pieces["weight"], pieces.get("bias", [])

    def _split(self, name: str) -> list[Tensor]:
        dim, lengths, shapes = self._pieces[name]
        whole: Tensor = getattr(self, name)
        pieces = whole.split(lengths, dim) if lengths else (whole,)
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes)]

    def _parts(self, name: str) -> tuple[ParamSharding, ...]:
        return self._shardings[name].parts or (self._shardings[name],)

    def _flat(self, y: Tensor, rows: int, at: int) -> Tensor:
        letters, local = self.features.parts[at], self._out[at]
        if self.heads is not None:
            place = next((i for i, dim in enumerate(letters) if dim.letter == "g"), None)
            if place is not None:
                y = _for_each_query(y, self.heads, rows + place)
                local = [*local[:place], self.heads.count, *local[place + 1 :]]
        if 0 in local and len(local) > 1:  # a rank without heads emits one of zeros
            return y.new_zeros((*y.shape[:rows], prod(max(n, 1) for n in local))) + y.sum()
        return y.flatten(rows) if len(local) > 1 else y

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{letter}={size}" for letter, size in self._sizes.items())
        return f"{self.features}, {sizes}, bias={self.bias is not None}"


def _for_each_query(y: Tensor, heads: Heads, dim: int) -> Tensor:
    """One KV head for each of this rank's query heads."""
    if not heads.count or set(heads.shares) == {1}:
        return y
    shape = list(y.shape)
    parts = []
    for at, share in enumerate(heads.shares):
        shape[dim] = share
        parts.append(y.narrow(dim, at, 1).expand(shape))
    return torch.cat(parts, dim)


def _axes(letters: Letters) -> list[str]:
    return [axis for dim in letters for axis in dim.axes]


def _symbols(letters: Letters, axis: str) -> list[Dim]:
    """Letters with the symbol of the axis, as templates of layers have it; storage is said by `stored`."""
    return [replace(dim, axes=tuple("tp" for one in dim.axes if one == axis)) for dim in letters]
