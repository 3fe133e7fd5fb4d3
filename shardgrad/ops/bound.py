"""Products that share their first operand, bound to a mesh: whatever does not change between calls, decided once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardgrad.arguments import unusual
from shardgrad.comm import shim
from shardgrad.comm.agree import agree, checking_every_call, every_call
from shardgrad.comm.mesh import MeshView, view
from shardgrad.comm.pieces import adding_in_tree, exact, refuse_exact
from shardgrad.errors import LayoutError, ShapeError
from shardgrad.layout.layout import Layout
from shardgrad.layout.lower import Key, Products, backward, forward
from shardgrad.layout.plan import Plan, Role
from shardgrad.layout.schedule import Instructions, communication
from shardgrad.layout.sizes import Level, Sizes
from shardgrad.ops import handles, sizing
from shardgrad.ops.bilinear import CONTRACT, Operation
from shardgrad.ops.executable import Executable
from shardgrad.ops.namespace import Namespace

if TYPE_CHECKING:
    from shardgrad.layout.cost import Collective

Given = tuple[tuple[str, int], ...]  # global sizes of letters

_MOST_SHAPES = 512  # programs remembered for a product; more than a training run has, few enough for memory


class BoundMatmul:
    """One or more products of one input, on one mesh: one kind of product, one choice of bias, kept operands and
    reduction dtype."""

    def __init__(
        self,
        layouts: tuple[Layout, ...],
        biased: tuple[bool, ...],
        view: MeshView,
        save_gathered: frozenset[Key],
        reduce_dtype: torch.dtype | None,
        operation: Operation,
    ) -> None:
        self.operation = operation
        self.layouts, self.biased, self.view = layouts, biased, view
        self.save_gathered, self.reduce_dtype = save_gathered, reduce_dtype
        self.device_type = view.device.type
        self.name = "; ".join(map(str, layouts))
        self.axes = tuple(dict.fromkeys(axis for layout in layouts for axis in layout.axes))
        view.require(self.axes, self.name)
        for layout in layouts:
            if layout.spatial != operation.spatial:
                of = f"{layout.spatial} spatial dims" if layout.spatial else "no spatial dims"
                raise LayoutError(
                    f"{layout} has {of}, but {operation} has {operation.spatial}: layouts with spatial dims are for "
                    "sg.convolve, others for sg.matmul"
                )
        # Sizes that follow from others, and that no operand gives.
        self._derived = {x for lay in layouts for x in lay.out.letters[len(lay.out.dims) - lay.spatial :]}
        self.plans: tuple[Plan, ...] = tuple(layout.plan for layout in layouts)
        self.count = len(layouts)
        biases = [layout.bias for layout, added in zip(layouts, biased) if added]
        self._specs = [layouts[0].lhs, *(layout.rhs for layout in layouts), *biases]  # of the tensors of a call
        self._gathers = [move for plan, bias in zip(self.plans, biased) for move in plan.gathers(bias=bias)]
        self._by_pieces: dict[object, dict[object, Executable]] = {}  # exact mode may be set, and set otherwise
        self._executables: dict[object, Executable] = {}
        self.use_settings()
        self.handle = handles.name(
            self, f"{self.name} on {view.handle}, {biased}, {sorted(save_gathered)}, {reduce_dtype}, {operation}"
        )

    def __repr__(self) -> str:
        return f"BoundMatmul({self.name})"

    def __deepcopy__(self, memo: object) -> BoundMatmul:
        return self  # bound to process groups, and never changed by a call

    @shim.untraced
    def __call__(self, tensors: tuple[Tensor, ...], given: Given) -> Any:
        """Every Y (a tensor if there is one), differentiably, outside of compiled graphs.

        tensors: the input, the weights, the biases that are there. given: global sizes of letters.
        """
        if torch.is_autocast_enabled(self.device_type) or shim.beyond_backward():
            return self._call_under(tensors, given)
        grad = torch.is_grad_enabled()
        if len(tensors) == 2:  # as `_key`, without a call and a loop
            x, w = tensors
            key: Any = x.shape, x.dtype, grad and x.requires_grad, w.shape, w.dtype, grad and w.requires_grad, given
        elif len(tensors) == 3:
            x, w, b = tensors
            key = (
                *(x.shape, x.dtype, grad and x.requires_grad, w.shape, w.dtype, grad and w.requires_grad),
                *(b.shape, b.dtype, grad and b.requires_grad, given),
            )
        else:
            key = _key(tensors, given)
        found = self._executables.get(key)
        if found is None or every_call:
            found = self.executable(tensors, given)
        return found.call(*tensors)

    def _call_under(self, tensors: tuple[Tensor, ...], given: Given) -> Any:
        """The same under autocast, torch.func's transforms or forward-mode differentiation."""
        if torch.is_autocast_enabled(self.device_type):
            tensors = cast(self.device_type, tensors)
            with torch.autocast(self.device_type, enabled=False):
                return self(tensors, given)
        from shardgrad.ops import derivatives

        refuse_exact(self.view, self.axes, f"torch.func or forward mode through {self.name}", "use backward()")
        made = derivatives.product(self.executable(tensors, given), tensors)
        return made if self.count > 1 else made[0]

    def executable(self, tensors: Sequence[Tensor], given: Given) -> Executable:
        """What to run for the shapes, dtypes and flags of a call; remembered.

        tensors: the input, the weights, the biases that are there.
        """
        key = _key(tensors, given)
        found = self._executables.get(key)
        if found is not None and not every_call:
            return found
        grad = torch.is_grad_enabled()
        return self._resolve(key, tensors, dict(given), tuple([grad and t.requires_grad for t in tensors]))

    def executable_for_graph(
        self, tensors: Sequence[Tensor], given: Mapping[str, int] | None, needs: tuple[bool, ...]
    ) -> Executable:
        """`executable` for a call in a compiled graph, which says itself what needs a gradient."""
        self._refuse_graph()
        key = (
            *[part for t, need in zip(tensors, needs) for part in (tuple(t.shape), t.dtype, need)],
            tuple(given.items()) if given else (),
        )
        found = self._executables.get(key)
        return found if found and not checking_every_call() else self._resolve(key, tensors, given, needs)

    def traced(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None) -> Products:
        """What a compiled graph must know of a call as it is traced; sizes that may change stay open.

        Raises:
            ShapeError: a size would have to be exchanged; a graph must know it.
        """
        self._refuse_graph()
        sizes, missing = self._learn(tensors, given)
        if missing:
            letters = sorted({letter for letter, _ in missing})
            raise ShapeError(
                f"the ranks would have to exchange the size of {', '.join(letters)}, which a compiled graph must "
                f"know: pass sizes={{{letters[0]!r}: …}} (layers: sequence_size=…; in {self.name})"
            )
        return self._products(sizes, tensors[0].dtype)

    def _refuse_graph(self) -> None:
        if exact(self.view) is not None:
            from shardgrad.ops.exact import refuse_graph

            refuse_graph(self.view, self.name)

    def _resolve(
        self, key: object, tensors: Sequence[Tensor], given: Mapping[str, int] | None, needs: tuple[bool, ...]
    ) -> Executable:
        sizes, exchanged = self._learn_or_exchange(tensors, given, needs)
        # Where sizes are exchanged, the local shapes do not give them; they are exchanged at every call.
        where = (key, tuple(sorted(sizes.known.items()))) if exchanged else key
        found = self._executables.get(where)
        if found is None:
            if len(self._executables) >= _MOST_SHAPES:
                self._executables.clear()
            found = self._executables[where] = self._build(tensors, sizes, needs)
        return found

    def _build(self, tensors: Sequence[Tensor], sizes: Sizes, needs: tuple[bool, ...]) -> Executable:
        products = self._products(sizes, tensors[0].dtype)
        of_local = sizes
        if products.pieces is not None:
            from shardgrad.ops.exact import sizes_of_pieces

            of_local = sizes_of_pieces(products, self.layouts, self.view)
        namespace = Namespace(self.view, sizes, [self.operation.local(layout, of_local) for layout in self.layouts])
        chunked = None
        if self.view.settings and products.pieces is None:
            from shardgrad.ops.chunking import chunking_pass  # what `set_overlap` sets

            chunked = chunking_pass(self.view, self.layouts, namespace, tensors[0].dtype)
        given = tuple((letter, size) for (letter, axes), size in sizes.known.items() if not axes)
        again = partial(self.__call__, given=given)
        made = Executable(products, self.name, namespace, needs, self._check_backward, chunked, again)
        if products.pieces is not None:
            from shardgrad.ops.exact import checked

            made.call = checked(made.call, self._specs, self.view)
        return made

    @property
    def built(self) -> list[Executable]:
        """What calls have needed so far."""
        return list(self._executables.values())

    def forget_executables(self) -> None:
        """Decide anew, because what the decisions rest on has changed."""
        self._by_pieces.clear()
        self.use_settings()

    def use_settings(self) -> None:
        """Go on with the decisions for the pieces that are set now."""
        pieces = exact(self.view)
        key = None if pieces is None else tuple(pieces.items())
        self._executables = self._by_pieces.setdefault(key, {})

    def sizes(self, tensors: Sequence[Tensor], given: Mapping[str, int] | None, needs: tuple[bool, ...]) -> Sizes:
        """Those of a call, looked at and compared with the other ranks' as a call's are; exchanged where they must be.

        needs: of each tensor, whether it needs a gradient.
        """
        return self._learn_or_exchange(tensors, given, needs)[0]

    def _learn_or_exchange(
        self, tensors: Sequence[Tensor], given: Mapping[str, int] | None, needs: tuple[bool, ...]
    ) -> tuple[Sizes, bool]:
        sizes, missing = self._learn(tensors, given, needs)
        if missing:
            from shardgrad.ops.size_exchange import exchange

            exchange(missing, sizes, self.view, self.name)
            self._derive(sizes)
        return sizes, bool(missing)

    def _learn(
        self, tensors: Sequence[Tensor], given: Mapping[str, int] | None, needs: tuple[bool, ...] | None = None
    ) -> tuple[Sizes, list[Level]]:
        """The sizes that the local shapes and `given` give, and the levels that they do not give.

        needs: of each tensor, whether it needs a gradient: compared with the other ranks. None: nothing is.
        """
        count = len(self.layouts)
        weights, biases = tensors[1 : count + 1], iter(tensors[count + 1 :])
        specs, values = [self.layouts[0].lhs], [tensors[0]]
        for layout, weight, biased in zip(self.layouts, weights, self.biased):
            specs.append(layout.rhs)
            values.append(weight)
            if biased:
                specs.append(layout.bias)
                values.append(next(biases))
        self._check_kind(values, [spec.name for spec in specs])
        given_sizes = {x: size for x, size in (given or {}).items() if x not in self._derived}
        sizes = sizing.learn(specs, values, given_sizes, self.view, self.name)
        sizes.known.update(((x, ()), size) for x, size in (given or {}).items() if x in self._derived)
        self._derive(sizes)
        if needs is not None:
            self._agree(self._products(sizes, tensors[0].dtype), needs)
        missing = [level for level in sizing.unknown(self._gathers, sizes) if level[0] not in self._derived]
        return sizes, missing

    def _derive(self, sizes: Sizes) -> None:
        for layout in self.layouts:
            self.operation.derive(layout, sizes)

    def _check_kind(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        first = tensors[0]
        for tensor, name in zip(tensors, names):
            if tensor.dtype != first.dtype:
                raise ShapeError(
                    f"{name} is {tensor.dtype} but {names[0]} is {first.dtype} (in {self.name}): convert one of them; "
                    "shardgrad never changes a dtype in silence"
                )
            if tensor.device.type != self.view.device.type:
                raise ShapeError(
                    f"{name} is on {tensor.device}, but the mesh is of {self.view.device.type} devices (in {self.name})"
                )
            if hasattr(tensor, "to_local"):
                raise ShapeError(f"{name} is a DTensor: pass its local shard, tensor.to_local() (in {self.name})")
            if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
                raise ShapeError(f"{name} is {unusual(tensor)}: products take dense tensors (in {self.name})")
        wide = self.reduced_in(first.dtype)
        if wide is not None and wide.itemsize < first.dtype.itemsize:
            raise ShapeError(
                f"reduce_dtype {self.reduce_dtype} is narrower than {first.dtype} of {names[0]}: sums would lose "
                f"what is there (in {self.name})"
            )
        if first.dtype.is_complex:
            raise ShapeError(f"{names[0]} is {first.dtype}: complex products are not supported (in {self.name})")

    def reduced_in(self, dtype: Any) -> torch.dtype | None:
        """`reduce_dtype` for operands of a dtype; float64 is left alone, as autocast leaves it."""
        return None if str(dtype).endswith("float64") else self.reduce_dtype

    def _products(self, sizes: Sizes, dtype: Any) -> Products:
        """What lowering needs to know."""
        wide = self.reduced_in(dtype)
        reduce_dtype = None if wide in (None, dtype) else str(wide).removeprefix("torch.")
        return Products(
            self.plans,
            self.biased,
            sizes,
            self.save_gathered,
            str(dtype).removeprefix("torch."),
            reduce_dtype,
            contraction=self.operation.spatial == 0,
            pieces=exact(self.view),
        )

    def _instructions(self, products: Products, *, gradients: bool) -> Instructions:
        """Forward, and backward with every gradient if any is wanted."""
        needs: list[set[Role]] = [{"lhs", "rhs", "bias"} if bias else {"lhs", "rhs"} for bias in self.biased]
        return (*forward(products), *(backward(products, needs) if gradients else ()))

    def collectives(self, sizes: Sizes, dtype: Any = "float32") -> list[Collective]:
        """Every collective of this rank's forward and backward, every gradient wanted, in order.

        Args:
            sizes: every size, as this rank knows it.
            dtype: of the operands; torch, NumPy, or a name.

        Raises:
            LayoutError: reduce_dtype is narrower than dtype.
        """
        from shardgrad.layout import cost, predict

        wire, reduce_wire = predict.widths(dtype, self.reduced_in(dtype))
        products = self._products(sizes, dtype)
        made = self._instructions(products, gradients=True)
        if products.pieces is not None:
            from shardgrad.layout.exact import in_pieces

            made = in_pieces(made, products)
        trees = adding_in_tree(self.view, reduce_wire)
        return list(cost.collectives(made, sizes, wire=wire, reduce_wire=reduce_wire, trees=trees))

    def _agree(self, products: Products, needs: tuple[bool, ...]) -> None:
        """Compare with the other ranks what all must mean alike, along every axis that a call communicates along.

        A backward counts with every gradient if any is wanted: ranks that want different ones raise.
        """
        moved: dict[str, set[str]] = {}
        for one in communication(self._instructions(products, gradients=any(needs))):
            moved.setdefault(one.move.axis, set()).update(dim.letter for dim in one.move.before)
        for axis in (axis for axis in self.axes if axis in moved):
            describe = partial(self._described, axis, moved[axis], products, needs)
            agree(self.view, self.view.axes[axis], describe, "a product")

    def _described(self, axis: str, letters: set[str], products: Products, needs: tuple[bool, ...]) -> str:
        """What the ranks of an axis must agree on; of sizes, those of what moves along it, not yet split by it."""
        lines = [f"layout {layout}{' with bias' if b else ''}" for layout, b in zip(self.layouts, self.biased)]
        lines.append(str(self.operation))
        lines += [f"dtype torch.{products.dtype}", f"reduce_dtype {self.reduce_dtype}"]
        lines.append(f"kept {sorted(self.save_gathered)}")
        if products.pieces is not None:
            lines.append(f"pieces {dict(products.pieces)}, with {torch.get_num_threads()} threads")
        names = [self.layouts[0].lhs.name, *(layout.rhs.name for layout in self.layouts)]
        names += [layout.bias.name for layout, biased in zip(self.layouts, self.biased) if biased]
        wanted = [name for name, need in zip(names, needs) if need]
        lines += [f"gradients wanted of {', '.join(wanted) or 'nothing'}"]
        for (letter, axes), size in sorted(products.sizes.known.items()):
            equal = products.pieces is not None and products.sizes.get(letter, ()) is None  # as pieces are
            if (axis not in axes and letter in letters) or (axis in axes and equal):
                lines.append(f"{'/'.join((letter, *axes))} = {size}")
        return "\n".join(lines)

    def _check_backward(self, dys: Sequence[Tensor | None]) -> None:
        """Compare with the other ranks which products these are, and the dtypes of their dYs (some may be absent)."""
        lines = ["backward", *(f"layout {layout}" for layout in self.layouts)]
        lines += sorted({f"dY is {dy.dtype}" for dy in dys if dy is not None})
        for name in self.axes:
            agree(self.view, self.view.axes[name], lambda: "\n".join(lines), "the backward of a product")


def _key(tensors: Sequence[Tensor], given: Given) -> tuple[object, ...]:
    """What decides which executable a call needs."""
    grad = torch.is_grad_enabled()
    return (*[part for t in tensors for part in (t.shape, t.dtype, grad and t.requires_grad)], given)


def bind(
    layouts: tuple[Layout, ...],
    biased: tuple[bool, ...],
    mesh: DeviceMesh,
    save_gathered: Collection[str] = (),
    reduce_dtype: torch.dtype | None = None,
    operation: Operation = CONTRACT,
) -> BoundMatmul:
    """Decide all that does not depend on shapes; the same arguments give the same product."""
    if isinstance(save_gathered, str):
        raise TypeError(f"save_gathered is a collection of operands' names: save_gathered=({save_gathered!r},)")
    mesh_view = view(mesh)
    key = (layouts, biased, tuple(save_gathered), reduce_dtype, operation)
    bound = mesh_view.bound.get(key)
    if bound is None:
        _check_layouts(layouts, biased)
        bound = BoundMatmul(layouts, biased, mesh_view, _kept(save_gathered, layouts), reduce_dtype, operation)
        mesh_view.bound[key] = bound
    return bound


def run(
    bound: BoundMatmul,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sizes: Mapping[str, int] | None,
) -> tuple[Tensor, ...]:
    """Differentiably compute bound products of x. biases: those that there are."""
    tensors = (x, *weights, *biases)
    if torch.compiler.is_compiling():
        from shardgrad.ops import compiled  # of no use elsewhere

        shim.leave_checkpoint()
        if torch.is_autocast_enabled(bound.device_type):
            tensors = cast(bound.device_type, tensors)
        return compiled.run(bound, tensors, sizes)
    made = bound(tensors, tuple(sizes.items()) if sizes else ())
    return made if bound.count > 1 else (made,)


def cast(device_type: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As autocast treats torch's own products: the operands are cast, and nothing inside is cast again."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple([t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors])


def _check_layouts(layouts: Sequence[Layout], biased: Sequence[bool]) -> None:
    first = layouts[0].lhs
    for layout, has_bias in zip(layouts, biased):
        if layout.lhs.dims != first.dims or layout.lhs.grad_partial != first.grad_partial:
            raise LayoutError(
                f"products of one input must write it alike: {first} in {layouts[0]}, {layout.lhs} in {layout}"
            )
        if layout.has_bias and not has_bias:
            raise LayoutError(f"{layout} adds a bias {layout.bias}, but none was given: pass bias=… or leave it out")


def _kept(save_gathered: Collection[str], layouts: Sequence[Layout]) -> frozenset[Key]:
    kept: set[Key] = set()
    for name in save_gathered:
        seconds = [("rhs", at) for at, layout in enumerate(layouts) if layout.rhs.name == name]
        firsts = [("lhs", at) for at, layout in enumerate(layouts) if layout.lhs.name == name]
        if not firsts and not seconds:
            raise LayoutError(f"save_gathered: no operand {name!r} in {'; '.join(map(str, layouts))}")
        kept.update(seconds + firsts)  # type: ignore[arg-type]
    return frozenset(kept)
