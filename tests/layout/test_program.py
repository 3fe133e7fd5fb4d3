"""The list of instructions, the passes over it, and the text that is printed: without a tensor."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from layouts import random_layout

from shardgrad import PRESETS, Layout, LayoutError
from shardgrad.layout.lower import Key, Products, backward, forward
from shardgrad.layout.passes import free, hide_latency, without_products
from shardgrad.layout.program import backward_program, forward_program
from shardgrad.layout.schedule import Communicate, Defer, Free, Instruction, Instructions, Return, Save, Wait
from shardgrad.layout.sizes import Sizes

COLUMN_SEQUENCE = """\
def forward(ctx, x, w, b):
    x_full = all_gather_x_tp(x)
    y = addmm(b, x_full, w)
    ctx.save_for_backward(x, w)
    ctx.set_materialize_grads(False)
    return y

def backward(dy, x, w):
    x_full = all_gather_x_tp.start(x)
    dx = linear(dy, w)
    dx = reduce_scatter_dx_tp.start(dx)
    x_full = all_gather_x_tp.wait(x_full)
    dw = x_full.t().mm(dy)
    del x_full
    db = dy.sum(0)
    dx = reduce_scatter_dx_tp.wait(dx)
    return dx, dw, db
"""


def test_the_program_of_a_layout() -> None:
    layout = Layout("X[n/tp,d] W[d,m/tp] -> Y[n,m/tp] + B[m/tp]")
    assert layout.program({"tp": 2}) == layout.program() == layout.program({"tp": 5, "dp": 3}) == COLUMN_SEQUENCE
    alone = layout.program({"tp": 1})
    assert "gather" not in alone
    assert "reduce" not in alone
    frozen = layout.program(frozen=("X", "B"))
    assert "dx = " not in frozen
    assert frozen.endswith("return None, dw, None\n")
    assert layout.program(frozen=("X", "W", "B")).startswith("def forward(x, w, b):")
    saved = layout.program(save_gathered=("X",))
    assert saved.count("all_gather_x_tp") == 1
    assert "def backward(dy, x_full, w):" in saved
    wide = layout.program(dtype="bfloat16", reduce_dtype="float32")
    assert "    dx = dx.to(float32)\n    dx = reduce_scatter_dx_tp.start(dx)\n" in wide
    assert "    dx = reduce_scatter_dx_tp.wait(dx)\n    dx = dx.to(bfloat16)\n" in wide
    assert layout.program(dtype="float32", reduce_dtype=torch.float32) == COLUMN_SEQUENCE


def test_a_bias_on_a_sum_that_is_left_to_the_caller_is_added_by_one_rank() -> None:
    layout = Layout("X[n,d/tp] W[d/tp,m] -> Y[n,m]{tp} + B[m]")
    assert "b" in layout.program({"tp": 3}).split("\n")[1]
    assert layout.program({"tp": 3}, coordinate={"tp": 2}).split("\n")[1] == "    y = x.mm(w)"


@pytest.mark.parametrize(
    "wrong",
    [
        {"mesh_shape": {}},
        {"mesh_shape": {"tp": 0}},
        {"mesh_shape": {"tp": 2}, "coordinate": {"tp": 7}},
        {"frozen": ("Q",)},
        {"save_gathered": ("B",)},
        {"dtype": "float32", "reduce_dtype": "bfloat16"},
    ],
)
def test_what_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        Layout("X[n,d] W[d,m/tp] -> Y[n,m/tp]").program(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "X[n,d] x[d,m/tp] -> y[n,m/tp] + Y[m/tp]",
        "if[n,d/tp] in[d/tp,m] -> is[n,m]",
        "ctx[n,d/tp] linear[d/tp,m] -> matmul[n,m] + later[m]",
        "dY[n/tp,d] dX[d,m/tp] -> X[n,m/tp]",
        "x_full[n/tp,d] None[d,m/tp] -> float32[n,m/tp]",
        "all_gather_x_tp[n/tp,d] x[d,m/tp] -> def[n,m/tp]",
        "True[n/tp,d] False[d,m/tp] -> print[n,m/tp]",
    ],
)
def test_the_words_of_a_layout_become_names_that_python_takes(text: str) -> None:
    program = Layout(text).program(dtype="bfloat16", reduce_dtype="float32")
    compile(program, "program", "exec")
    arguments = [line.partition("(")[2].rstrip("):").split(", ") for line in program.split("\n") if line[:4] == "def "]
    assert all(len(set(names)) == len(names) for names in arguments)


# Of any layouts: what must hold of every list, before and after the passes.


def cases() -> Iterator[Products]:
    rng = random.Random(11)
    for preset in PRESETS.values():
        yield products(rng, [preset])
    for _ in range(150):
        layout = random_layout(rng, ("a", "b", "c"))
        shared = [layout]
        while len(shared) < rng.choice((1, 1, 2, 3)):
            # Another product of the same input: the same text, another weight and output.
            shared.append(Layout(layout.text.replace("W[", f"V{len(shared)}[").replace("Y[", f"Z{len(shared)}[")))
        yield products(rng, shared)


def products(rng: random.Random, layouts: list[Layout]) -> Products:
    shape = {axis: rng.choice((1, 2, 3)) for layout in layouts for axis in layout.axes}
    coordinate = {axis: rng.randrange(size) for axis, size in shape.items()}
    keys: list[Key] = [("lhs", 0), *(("rhs", at) for at in range(len(layouts)))]
    return Products(
        tuple(layout.plan for layout in layouts),
        tuple(layout.has_bias for layout in layouts),
        Sizes(shape, coordinate),
        frozenset(rng.sample(keys, rng.randrange(len(keys) + 1))),
        *rng.choice((("float32", None), ("bfloat16", "float32"))),
        contraction=rng.random() < 0.8,
    )


CASES = list(cases())


def lists(p: Products) -> Iterator[tuple[Instructions, tuple[str, ...]]]:
    """Lists of instructions as lowered, with the values that are there before: forward, and backward in some ways."""
    rng = random.Random(str(p.plans))
    count = 1 + p.count + len(p.biases)
    for _ in range(4):
        needs = [rng.random() < 0.8 for _ in range(count)]
        yield forward(p, needs if any(needs) else None), p.arguments()
        has_grad = [rng.random() < 0.8 for _ in range(p.count)]
        roles = p.roles_needed(needs, p.taking_part(has_grad))
        main = [at for at in range(count) if rng.random() < 0.3]
        given = (*p.names.dy, *p.saved_values(needs), *(p.names.main[at] for at in main))
        for defer in (False, True):
            yield backward(p, roles, main=main, defer=defer), given


def flat(instructions: Instructions) -> Iterator[Instruction]:
    for one in instructions:
        if isinstance(one, Defer):
            yield from flat(one.body)
        yield one


def check_order(instructions: Instructions, given: tuple[str, ...]) -> None:
    """Everything is made before it is read, nothing is read on its way or when it is gone, and all ends."""
    here, coming, gone = set(given), set[str](), set[str]()
    for one in instructions:
        if isinstance(one, Defer):
            check_order(one.body, tuple(here - coming))
            here.add(one.out)
            continue
        if isinstance(one, Wait):
            assert one.started.out in coming, one
            coming.remove(one.started.out)
        else:
            assert not coming.intersection((*one.reads, *one.writes)) - ({one.out} if _starts(one) else set()), one
        assert here.issuperset(one.reads), (one, here)
        assert not gone.intersection(one.reads), one
        here.update(one.writes)
        if _starts(one):
            coming.add(one.out)  # type: ignore[attr-defined]
        if isinstance(one, Free):
            gone.update(one.values)
    assert isinstance(instructions[-1], Return)
    assert not coming


def _starts(one: Instruction) -> bool:
    return isinstance(one, Communicate) and not one.blocking


@pytest.mark.parametrize("at", range(len(CASES)))
def test_passes_move_instructions_and_lose_none(at: int) -> None:
    p = CASES[at]
    for lowered, given in lists(p):
        check_order(lowered, given)
        passed = hide_latency(lowered)
        check_order(passed, given)
        check_order(free(passed), given)

        def bare(instructions: Instructions) -> Counter[object]:
            """What is done, less the waits (of which a blocking call has none) and the grouping."""
            kept = (one for one in flat(instructions) if not isinstance(one, Wait | Free | Defer))
            return Counter(
                (one.tensor, one.move, one.out, one.src) if isinstance(one, Communicate) else one for one in kept
            )

        assert bare(lowered) == bare(passed) == bare(free(passed))
        waits = sum(isinstance(one, Wait) for one in flat(passed))
        assert waits == sum(_starts(one) for one in flat(passed))


@pytest.mark.parametrize("at", range(len(CASES)))
def test_what_is_printed_is_python_with_a_name_for_all_it_uses(at: int) -> None:
    p = CASES[at]
    count = 1 + p.count + len(p.biases)
    for needs in ((True,) * count, (False,) + (True,) * (count - 1)):
        for printed in (
            forward_program(p, needs),
            backward_program(p, needs, (True,) * p.count),
            backward_program(p, needs, (True,) * p.count, main=range(count), defer=True),
        ):
            code = compile(printed.text, "program", "exec")
            space: dict[str, object] = {}
            exec(code, space)
            function = space[printed.name].__code__  # type: ignore[attr-defined]
            inner = [const for const in function.co_consts if hasattr(const, "co_names")]
            used = {name for one in (function, *inner) for name in one.co_names if not hasattr(_Tensor, name)}
            assert used <= {*printed.globals, "linear", "matmul", "addmm"}, printed.text
            assert set(printed.globals) <= used


def mixed(*texts: str) -> Products:
    """Products of one input whose weights are stored in different ways: of some, nothing communicates."""
    layouts = [Layout(text) for text in texts]
    axes = dict.fromkeys(axis for layout in layouts for axis in layout.axes)
    sizes = Sizes(dict.fromkeys(axes, 2), dict.fromkeys(axes, 0))
    return Products(tuple(layout.plan for layout in layouts), tuple(layout.has_bias for layout in layouts), sizes)


MIXED = [
    mixed(
        "X[n/dp,d] Wa[m,d] -> A[n/dp,m]",
        "X[n/dp,d] Wc[n/dp,m,d] -> C[n/dp,m]",
        "X[n/dp,d] We[m/dp,d] -> E[n,m/dp]",
    ),
    mixed("X[n/tp,d] W[n/tp,m,d] -> Y[n/tp,m]", "X[n/tp,d] V[o,d] -> Z[n/tp,o] + B1[o]"),
    mixed("X[n/tp,d] W[n/tp,d] -> Y[n/tp]", "X[n/tp,d] V[o/tp,d] -> Z[n,o/tp]", "X[n/tp,d] U[n/tp,k,d] -> Q[n/tp,k]"),
]


@pytest.mark.parametrize("p", [*MIXED, *(p for p in CASES if p.count > 1)])
def test_ranks_that_lack_different_dys_communicate_in_one_order(p: Products) -> None:
    count = 1 + p.count + len(p.biases)
    for needs in ((True,) * count, (False,) + (True,) * (count - 1), (True,) + (False,) * (count - 1)):
        orders = set()
        for pattern in itertools.product((True, False), repeat=p.count):
            if any(pattern):
                has_grad = p.taking_part(pattern)
                printed = backward_program(p, needs, has_grad)
                orders.add(tuple((c.tensor, c.move) for c in printed.globals.values() if isinstance(c, Communicate)))
                absent = {at for at, has in enumerate(has_grad) if not has}
                full = hide_latency(backward(p, p.roles_needed(needs, (True,) * p.count)))
                given = (*(p.names.dy[at] for at in range(p.count) if has_grad[at]), *p.saved_values(needs))
                check_order(without_products(full, absent), given)
        assert len(orders) == 1, orders


class _Tensor:
    """The methods that programs call."""

    mm = t = flatten = sum = permute = contiguous = clone = add_ = to = start = wait = None
    save_for_backward = set_materialize_grads = None


def test_a_gather_starts_one_product_early_and_a_reduction_ends_last() -> None:
    """In the order in which things happen, for three products of a gathered input."""
    layouts = [Layout(f"X[n/dp/tp,d] W{i}[d/dp,m{i}/tp] -> Y{i}[n/dp,m{i}/tp]") for i in range(3)]
    p = Products(tuple(lay.plan for lay in layouts), (False,) * 3, Sizes({"tp": 2, "dp": 2}, {"tp": 0, "dp": 0}))
    text = forward_program(p, None).text
    lines = [line.strip() for line in text.split("\n")]
    assert lines.index("w2_full = all_gather_w2_dp.start(w2)") < lines.index("y1 = x_full.mm(w1_full)")
    assert lines.index("w2_full = all_gather_w2_dp.start(w2)") > lines.index("y0 = x_full.mm(w0_full)")
    back = backward_program(p, (True,) * 4, (True,) * 3).text
    assert back.count("reduce_scatter_dx_tp.start") == 1  # summed over the three first
    assert "dx = matmul_add_dx(dy1, w1_full, dx)" in back
    waits = [line.strip() for line in back.split("\n")[-6:-2]]
    assert waits == [
        f"d{v} = reduce_scatter_d{v}_{a}.wait(d{v})" for v, a in zip(("x", "w0", "w1", "w2"), ["tp", "dp", "dp", "dp"])
    ]


def test_saves_only_what_the_wanted_gradients_read() -> None:
    layout = PRESETS["column"]
    for frozen, values in (((), ("x", "w")), (("X",), ("x",)), (("W",), ("w",))):
        made = layout.program(frozen=frozen)
        assert f"ctx.save_for_backward({', '.join(values)})" in made
    assert not any(isinstance(one, Save) for one in layout.instructions({"tp": 2}))


def test_a_gradient_that_is_added_to_a_buffer_stays_as_wide_as_it_was_reduced() -> None:
    plan = PRESETS["data"].plan
    p = Products((plan,), (False,), Sizes({"dp": 2}, {"dp": 0}), dtype="bfloat16", reduce_dtype="float32")
    text = backward_program(p, (True, True), (True,), main=(1,)).text
    assert "dw = dw.to(float32)" in text
    assert "to(bfloat16)" not in text
    assert "main_w.add_(dw)" in text
