"""The straight-line Python of forward and backward: instructions, passed over and printed. What `ops` runs, as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from shardgrad.layout.contraction import LINEAR, arrange
from shardgrad.layout.exact import in_pieces
from shardgrad.layout.lower import Products, backward, forward
from shardgrad.layout.passes import free, hide_latency, without_products
from shardgrad.layout.printer import Printed, print_function
from shardgrad.layout.schedule import Instructions, Matmul, Return, Save

# torch's own way to write a product of matrices and a bias.
_WITH_BIAS = {LINEAR: "linear({0}, {1}, {2})", "{0}.mm({1})": "addmm({2}, {0}, {1})"}

Pass = Callable[[Instructions], Instructions]


def forward_program(
    products: Products, needs: Sequence[bool] | None, also: Pass | None = None, *, returns_saved: bool = False
) -> Printed:
    """The function that makes every Y, of X, the weights and the biases that there are.

    Args:
        needs: of X, each weight and each bias, whether backward makes its gradient; None if it makes none.
        also: one more pass.
        returns_saved: return what is saved as gathered, after the Ys and in a tuple, rather than save anything.
    """
    made = hide_latency(forward(products, needs))
    if returns_saved:
        keys = products.saved(needs) if needs else ()
        gathered = [products.value(key, gathered=True) for key in keys if key in products.saved_gathered]
        made = tuple(
            Return(one.phase, (*one.results, *gathered)) if isinstance(one, Return) else one
            for one in made
            if not isinstance(one, Save)
        )
    arguments = products.arguments()
    saves = any(isinstance(one, Save) for one in made)
    return _printed("forward", ("ctx", *arguments) if saves else arguments, made, products, also)


def backward_program(
    products: Products,
    needs: Sequence[bool],
    has_grad: Sequence[bool],
    also: Pass | None = None,
    *,
    main: Collection[int] = (),
    defer: bool = False,
    hold: str | None = None,
) -> Printed:
    """The function that makes the gradients, of every dY, what forward saved, and the buffers of `main`.

    Args:
        needs: as of `forward_program`.
        has_grad: for each product, whether there is a dY.
        main, defer: as of `lower.backward`. hold: in exact mode, the axis of whose pieces this is a micro-batch.
    """
    names = products.names
    # Ordered as if every dY were there, so that ranks which lack different ones communicate in one order.
    every = [any(has_grad)] * products.count
    made = hide_latency(backward(products, products.roles_needed(needs, every), main=main, defer=defer))
    absent = {at for at, (takes, has) in enumerate(zip(every, has_grad)) if takes and not has}
    buffers = (names.main[output] for output in sorted(main))
    arguments = (*names.dy, *products.saved_values(needs), *buffers)
    return _printed("backward", arguments, made, products, also, absent, hold)


def _printed(
    name: str,
    arguments: tuple[str, ...],
    made: Instructions,
    products: Products,
    also: Pass | None,
    absent: Collection[int] = (),
    hold: str | None = None,
) -> Printed:
    def expression(one: Matmul) -> str | None:
        """torch's own way to write a local product, where it has one."""
        if not products.contraction or one.into is not None:
            return None
        letters = products.plans[one.index].letters
        left, right = one.operands
        found = arrange(letters[left], letters[right], letters[one.role])
        if one.bias is None:
            return found.expression
        return _WITH_BIAS.get(found.expression or "") if found.rows == 1 else None

    passed = without_products(made if also is None else also(made), absent)
    if products.pieces is not None:
        passed = in_pieces(passed, products, hold)
    return print_function(name, arguments, free(passed), expression)
