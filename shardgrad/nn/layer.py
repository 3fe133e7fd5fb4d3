"""The base of the layers: a layer states its layouts and what lies between them; this binds, runs and predicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import explain
from shardgrad.comm import shim
from shardgrad.comm.mesh import view
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.notation import TensorSpec, parse
from shardgrad.layout.sizes import Sizes
from shardgrad.nn import init
from shardgrad.nn.data_parallel import check_replicas_alike
from shardgrad.nn.docstring import with_products
from shardgrad.nn.module import ShardedModule
from shardgrad.nn.parallel import Parallel, Where
from shardgrad.nn.recipe import Bound, Product, Recipe
from shardgrad.nn.template import on_axis
from shardgrad.ops.bilinear import Operation
from shardgrad.ops.bound import run

if TYPE_CHECKING:
    from shardgrad.layout.batch_axis import BatchAxis
    from shardgrad.layout.cost import Collective


class Layer(ShardedModule):
    """A layer of products. A subclass states, as class arguments, the layout of its product, or the layouts by name:

        class ColumnParallelLinear(OneProduct, layout="X[n/sp,d] W[m/tp,d] -> Y[n,m/tp] + B[m/tp]"):

    as templates, see `nn.template`. The parameters of a product `gate` are gate_weight and gate_bias, those of the one
    `layout` weight and bias. Products of one input, X, share its gather and the reduction of its gradient. Further:

        __init__    super().__init__(where), then build(sizes)
        forward     what lies between the products: `multiply("X", x)` gives those of X; see `OneProduct`
        transfers   what it sends besides its products, if it does.

    Parameters and their initial values, binding, torch.compile, `collectives` and the docstring's table follow from the
    layouts.
    """

    products: ClassVar[Mapping[str, str]] = {}
    takes: ClassVar[type] = Where  # the keywords that the constructor passes on
    default_axis: ClassVar[str] = "tp"

    def __init_subclass__(
        cls, layout: str | None = None, layouts: Mapping[str, str] | None = None, lookup: str | None = None
    ) -> None:
        """lookup: the layout of a product with one-hot rows, computed as a lookup; for the docstring."""
        super().__init_subclass__()
        if layout is not None or layouts is not None:
            cls.products = {"": layout} if layout is not None else dict(layouts or {})
            cls.__doc__ = with_products(cls.__doc__ or "", list(cls.products.values()), lookup)

    def __init__(
        self,
        where: Mapping[str, Any],
        *,
        reduce: bool = True,
        save_gathered: Collection[str] = (),
        axes: Sequence[str] | None = None,
    ) -> None:
        """where: the constructor's keywords of `takes`. axes: of the mesh; None: those of `Parallel`."""
        user = type(self).__name__
        parallel = Parallel.of(user, where, self.takes, self.default_axis)
        super().__init__(parallel.mesh, parallel.axes if axes is None else axes)
        if not reduce and parallel.sequence_dim is not None:
            raise LayoutError(
                f"{user}: with reduce=False the caller gathers x and reduces y (sg.all_gather, sg.reduce_scatter along "
                "the sequence), and the layer sees whole sequences: leave out "
                f"sequence_dim={parallel.sequence_dim}"
            )
        self.parallel, self.reduce, self.save_gathered = parallel, reduce, tuple(save_gathered)
        self._recipes: dict[str, Recipe] = {}  # by the name of the input
        self._sizes: dict[str, int] = {}
        self._input = ""
        self._in_letters: dict[str, list[int]] = {}  # the shapes of parameters some of whose letters are one dim

    def build(
        self,
        sizes: Mapping[str, int],
        *,
        bias: bool = True,
        products: Mapping[str, str | Layout] | None = None,
        operation: Operation | None = None,
        merged: Mapping[str, tuple[int, ...]] | None = None,
        unknown: Collection[str] = (),
    ) -> None:
        """Declare the parameters of all products, and give them their initial values.

        Args:
            sizes: the global size of every letter that the layer knows.
            products: instead of the class's, where a choice decides them.
            operation: what kind of products they are; None: matmul's.
            merged: of a parameter, as of `ParamSharding`.
            unknown: letters that are not sharded as the axis shards: their sizes are not given to products.
        """
        self._sizes = dict(sizes)
        groups: dict[str, list[Product]] = {}
        for name, template in (self.products if products is None else products).items():
            names = self.parameter_name(name, "weight"), self.parameter_name(name, "bias")
            if isinstance(template, Layout):
                x, weight, added = template.lhs.name, template.rhs, template.bias
            else:
                notation = parse(template)
                x, weight, added = notation.lhs.name, self.stored(notation.rhs), self.stored(notation.bias, vector=True)
            each = Product(template, weight, added if bias else None, names)
            for parameter, spec in zip(names, (each.weight, each.bias)):
                if spec is None:
                    self.register_parameter(parameter, None)
                else:
                    self.add(parameter, self.storage(name, spec), (merged or {}).get(parameter))
            groups.setdefault(x, []).append(each)
        self._input = next(iter(groups), "")
        common = tuple((x, size) for x, size in sizes.items() if x not in unknown), self.parallel, self.reduce
        for x, group in groups.items():
            self._recipes[x] = Recipe(type(self).__name__, tuple(group), *common, self.save_gathered, operation)
        self.reset_parameters()

    def stored(self, spec: TensorSpec | None, *, vector: bool = False) -> Any:
        """How a parameter of a template is stored: over the layer's axis, and as the data parallel one has it.

        vector: as of `BatchAxis.storage`.
        """
        if spec is None:
            return None
        spec = on_axis(spec, self.axis)
        return spec if self.data is None else self.data.storage(spec, self._sizes, vector=vector)

    def add(self, name: str, spec: TensorSpec, merged: tuple[int, ...] | None = None) -> None:
        """Declare a parameter on the layer's device and of its dtype."""
        self.declare(name, str(spec), self._sizes, self.parallel.device, self.parallel.dtype, merged)
        if merged is not None:
            self._in_letters[name] = self._shardings[name].block()[1]

    def operand(self, name: str) -> Tensor:
        """A parameter as products have it, with a dim for each letter."""
        parameter: Tensor = getattr(self, name)
        return parameter.view(self._in_letters[name]) if name in self._in_letters else parameter

    def parameter_name(self, product: str, kind: str) -> str:
        """The name of a product's weight or bias."""
        return f"{product}_{kind}" if product else kind

    def storage(self, product: str, spec: TensorSpec) -> TensorSpec:
        """How a parameter is stored that the product uses as `spec`: like that, unless the layer brings it there."""
        return spec

    @property
    def axis(self) -> str:
        return self.parallel.axis

    @property
    def sequence_dim(self) -> int | None:
        return self.parallel.sequence_dim

    @property
    def data(self) -> BatchAxis | None:
        return self.parallel.data

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        return self.parallel.reduce_dtype

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """nn.Linear's initial values, of every product: uniform in ±1/√(how many terms an element of it sums)."""
        for recipe in self._recipes.values():
            for notation, one in zip(recipe.notations, recipe.products):
                terms = prod(self._sizes[a] for a in notation.rhs.letters if a not in notation.out.letters)
                values = partial(init.uniform, 1 / sqrt(terms))
                for name in one.names:
                    if getattr(self, name) is not None:
                        self.fill(name, values, generator)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Self:
        """A layer whose parameters are this rank's parts of global tensors, alike on every rank. Nothing is drawn or
        sent. A tensor that is frozen makes a frozen parameter.

            sg.SwiGLU.from_tensors({"gate_weight": g, "up_weight": u, "down_weight": d}, 24, 61, mesh=mesh)

        Args:
            tensors: by the parameter's name, of its global shape; all that the layer has.
            args, kwargs: of the constructor.

        Raises:
            ShapeError: a tensor is missing, is one too many, or has another shape.
        """
        from shardgrad.nn.existing import layer_of

        return layer_of(cls, tensors, args, kwargs)

    def layouts(self, dims: int) -> tuple[Layout, ...]:
        """The layouts of all products, in order, for an input of so many dims."""
        return tuple(
            one for x in self._recipes for one in self._recipes[x].layouts(self._dims(x, dims), self._biased(x))
        )

    def _dims(self, x: str, dims: int) -> int:
        """How many dims the input x of products has, if that of the layer has so many."""
        return dims - self._recipes[self._input].features + self._recipes[x].features

    def _biased(self, x: str) -> bool:
        return getattr(self, self._recipes[x].products[0].names[1]) is not None

    def _bind(self, x: str, dims: int, biased: bool) -> Bound:
        check_replicas_alike(self._shardings, type(self).__name__)  # under a DDP that did not ask for the parameters
        bound = self._products[x, dims, biased] = self._recipes[x].bind(dims, biased)
        return bound

    @shim.constant
    def _bound(self, x: str, dims: int, biased: bool, key: str, mesh: DeviceMesh) -> Bound:
        """`_bind` while torch.compile traces, which does not look into it. What it depends on, key and mesh, is read in
        the graph, so that a graph made for one layer is not used for another one."""
        return self._bind(x, dims, biased)

    def multiply(
        self,
        name: str,
        x: Tensor,
        sequence_size: int | None = None,
        *,
        operands: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> tuple[Tensor, ...]:
        """The products of the input of this name, in their order.

        Args:
            x: as the layouts store it.
            sequence_size: of the whole sequence, where sequence_dim shards it: the ranks otherwise exchange it.
            operands: weights and biases, where they are not the parameters as they are; in exact mode made of
                parameters as `row_pieces` gives them.
            sizes: global sizes of letters that the layer does not know.

        Raises:
            ShapeError: x does not fit; see `matmul` for the rest.
        """
        try:
            dims, biased = x.dim(), self._biased(name)
            if torch.compiler.is_compiling():
                bound = self._bound(name, dims, biased, self._recipes[name].key, self.mesh)
            else:
                bound = self._products.get((name, dims, biased)) or self._bind(name, dims, biased)
            if operands is None:
                weights, biases = zip(*(one.names for one in self._recipes[name].products))
                operands = [self.operand(one) for one in weights], [self.operand(one) for one in biases if biased]
            known = dict(bound.given)
            if sequence_size is not None and bound.sequence is not None:
                known[bound.sequence] = sequence_size
            if sizes:
                known.update(sizes)
            return run(bound.matmul, x, *operands, known)
        except Exception as error:
            if torch.compiler.is_compiling():  # from torch 2.14 on it looks into handlers
                raise
            self._explain(error, x, sequence_size)
            raise

    @staticmethod
    def compiling() -> bool:
        """Whether torch.compile traces."""
        return torch.compiler.is_compiling()

    def collectives(self, shape: Sequence[int], dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward, as `Layout.collectives`.

        Args:
            shape: the global shape of x.
            dtype: of x and the parameters.
        """
        sizes = self.global_sizes(shape)
        return [*self._of_products(sizes, len(shape), dtype), *self.transfers(sizes, len(shape), dtype)]

    def _of_products(self, sizes: Sizes, dims: int, dtype: Any) -> list[Collective]:
        found: list[Collective] = []
        for x in self._recipes:
            key = x, self._dims(x, dims), self._biased(x)
            found += (self._products.get(key) or self._bind(*key)).matmul.collectives(sizes, dtype)
        return found

    def global_sizes(self, shape: Sequence[int]) -> Sizes:
        """The size of every letter, for x of a global shape.

        Raises:
            ShapeError: x has other features.
        """
        recipe, rows = self._recipes[self._input], self._recipes[self._input].rows(len(shape))
        features = [self._sizes[x] for x in recipe.notations[0].lhs.letters[-1:] if x in self._sizes]
        if features and shape[-1] != features[0]:
            raise ShapeError(f"x has global shape [..., {features[0]}], not {tuple(shape)}")
        return self.resolve({**self._sizes, **dict(zip(rows.letters, shape))})

    def resolve(self, sizes: Mapping[str, int]) -> Sizes:
        """Global sizes as this rank's."""
        mesh_view = view(self.mesh)
        return Sizes(mesh_view.shape, mesh_view.coordinate, {(letter, ()): size for letter, size in sizes.items()})

    def transfers(self, sizes: Sizes, dims: int, dtype: Any) -> Iterable[Collective]:
        """What a layer sends besides its products, for x of so many dims; see `nn.transfer`."""
        return ()

    def _explain(self, error: Exception, x: Any, sequence_size: int | None) -> None:
        """Put this layer before what is said of its products' shapes, and say what is wrong with its arguments."""
        name = type(self).__name__
        if isinstance(error, ShapeError) and not str(error).startswith(name):
            error.args = (f"{name}({self.extra_repr()}): {error}",)
        explain(error, OneProduct.forward, (self, x, sequence_size), {}, name)

    def _flags(self) -> str:
        """How a layer is parallel, for its repr."""
        sequence = "" if self.sequence_dim is None else f", sequence_dim={self.sequence_dim}"
        return f"axis={self.axis!r}{sequence}" + ("" if self.reduce else ", reduce=False")


class OneProduct(Layer):
    """A layer whose forward is its one product, perhaps with something before and after it."""

    weight: Tensor
    bias: Tensor | None
    wraps: bool = False  # whether `enter` and `leave` do anything

    def forward(self, x: Tensor, sequence_size: int | None = None) -> Tensor:
        """The local shard of Y.

        Args:
            x: stored as the first tensor of `self.layouts(x.dim())[0]`.
            sequence_size: the size of the sequence dim over all ranks. Only of use where x is sharded by it: the ranks
                otherwise exchange it at every call (one small exchange).

        Raises:
            ShapeError: x does not fit; see `matmul` for the rest.
        """
        try:
            if self.wraps:
                x = self.enter(x)
            if torch.compiler.is_compiling():
                y = self.multiply(self._input, x, sequence_size)[0]
            else:  # the same, in the fewest steps
                parameters = self._parameters
                plain = "weight" in parameters and "bias" in parameters  # not parametrized: found at once
                weight: Any = parameters["weight"] if plain else self.weight
                bias: Any = parameters["bias"] if plain else self.bias
                if self._in_letters:
                    weight, bias = self.operand("weight"), None if bias is None else self.operand("bias")
                key = self._input, x.dim(), bias is not None
                bound = self._products.get(key) or self._bind(*key)
                given = bound.given
                if sequence_size is not None and bound.sequence is not None:
                    given = (*given, (bound.sequence, sequence_size))
                y = bound.matmul((x, weight) if bias is None else (x, weight, bias), given)
            return self.leave(y) if self.wraps else y
        except Exception as error:
            if torch.compiler.is_compiling():  # from torch 2.14 on it looks into handlers
                raise
            self._explain(error, x, sequence_size)
            raise

    def enter(self, x: Tensor) -> Tensor:
        """What becomes of x before a layer's one product."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """What becomes of y after a layer's one product."""
        return y
