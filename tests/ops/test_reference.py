"""The reference's ways of saying one gradient agree, with each other and with torch's autograd."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from shardgrad.ops import reference as ref


class Convention(NamedTuple):
    """One way to write a product of two matrices; the operands are named by their place in it."""

    rule: Callable[..., tuple[ref.Array, ref.Array]]
    chain_rule: Callable[..., tuple[ref.Array, ref.Array]]
    jacobians: Callable[..., tuple[ref.Array, ref.Array]]
    spec: str


CONVENTIONS = [
    pytest.param(Convention(ref.matmul_backward_xw, ref.chain_rule_xw, ref.jacobians_xw, "nd,dm->nm"), id="Y=XW"),
    pytest.param(Convention(ref.matmul_backward_wx, ref.chain_rule_wx, ref.jacobians_wx, "mn,nk->mk"), id="Y=WX"),
]
both_conventions = pytest.mark.parametrize("convention", CONVENTIONS)

# Rows, contracted, columns: no two sizes equal, so that no transposed or swapped shape fits by chance.
SIZES = [(2, 3, 5), (5, 2, 3), (1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1), (0, 2, 3), (2, 0, 3), (2, 3, 0)]
all_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)

SPECS = [
    "nd,dm->nm",
    "mn,nk->mk",
    "bsd,fd->bsf",  # torch's weight is [out, in]
    "bsd,dgf->bsgf",  # a fused weight: gate and up
    "end,edm->enm",  # batched: a product for each expert
    "bhqd,bhkd->bhqk",  # batched twice: attention scores
    "bcsk,ock->bos",  # a convolution over windows: two contracted letters
    "d,d->",  # no rows, no columns
    "n,m->nm",  # nothing contracted
    "ab,ab->ab",  # everything batched
    "nd,dm->mn",  # the product stored transposed
]
all_specs = pytest.mark.parametrize("spec", SPECS)


def random(*shapes: tuple[int, ...], whole: bool = False, seed: int = 0) -> list[ref.Array]:
    """Arrays of these shapes, all from one stream, so that no two are alike."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-9, 10, shape) if whole else rng.standard_normal(shape) for shape in shapes]


def matrices(sizes: tuple[int, int, int], *, whole: bool = False) -> list[ref.Array]:
    """The operands of a product of two matrices, and dY."""
    n, d, m = sizes
    return random((n, d), (d, m), (n, m), whole=whole)


def tensors(spec: str, *, smallest: int = 2, whole: bool = False, seed: int = 0) -> list[ref.Array]:
    """The operands of `spec` and dY; no two letters have one size."""
    size = {letter: smallest + i for i, letter in enumerate(sorted({*spec} - {*",->"}))}
    letters = spec.replace("->", ",").split(",")
    return random(*(tuple(size[letter] for letter in of) for of in letters), whole=whole, seed=seed)


def autograd(forward: Callable[..., torch.Tensor], grad_y: ref.Array, *operands: ref.Array) -> list[ref.Array]:
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in operands]
    grads = torch.autograd.grad(forward(*leaves), leaves, torch.tensor(grad_y, dtype=torch.float64))
    return [grad.numpy() for grad in grads]


def assert_close(actual: ref.Array, expected: ref.Array) -> None:
    # Sums of at most a few hundred products of standard normal numbers: rounding stays below 1e-12.
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def assert_exact(actual: ref.Array, expected: ref.Array) -> None:
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected, strict=True)


# Matrices, both conventions.


@both_conventions
@all_sizes
def test_rules_are_what_autograd_computes(convention: Convention, sizes: tuple[int, int, int]) -> None:
    a, b, grad_y = matrices(sizes)
    for actual, expected in zip(convention.rule(a, b, grad_y), autograd(torch.matmul, grad_y, a, b)):
        assert_close(actual, expected)


@both_conventions
@all_sizes
def test_rules_are_the_chain_rule(convention: Convention, sizes: tuple[int, int, int]) -> None:
    operands = matrices(sizes, whole=True)
    for actual, expected in zip(convention.rule(*operands), convention.chain_rule(*operands)):
        assert_exact(actual, expected)


@both_conventions
@all_sizes
def test_rules_are_the_jacobians_transposed(convention: Convention, sizes: tuple[int, int, int]) -> None:
    a, b, grad_y = matrices(sizes, whole=True)
    jacobians = convention.jacobians(a, b)
    for grad, jacobian in zip(convention.rule(a, b, grad_y), jacobians):
        assert_exact(grad.ravel(), jacobian.T @ grad_y.ravel())


@both_conventions
@all_sizes
def test_rules_are_the_measured_slope(convention: Convention, sizes: tuple[int, int, int]) -> None:
    a, b, grad_y = matrices(sizes, whole=True)
    grad_a, grad_b = convention.rule(a, b, grad_y)
    np.testing.assert_array_equal(ref.finite_difference(lambda a: a @ b, a, grad_y), grad_a)
    np.testing.assert_array_equal(ref.finite_difference(lambda b: a @ b, b, grad_y), grad_b)


@both_conventions
@all_sizes
def test_rules_are_the_contraction(convention: Convention, sizes: tuple[int, int, int]) -> None:
    a, b, grad_y = matrices(sizes, whole=True)
    contracted = ref.contract_backward(a, b, grad_y, convention.spec)
    for actual, expected in zip(contracted, convention.rule(a, b, grad_y)):
        assert_exact(actual, expected)


@both_conventions
def test_jacobians_are_what_autograd_computes(convention: Convention) -> None:
    a, b, _ = matrices((2, 3, 4))
    expected = torch.autograd.functional.jacobian(torch.matmul, (torch.tensor(a), torch.tensor(b)))
    for actual, operand, full in zip(convention.jacobians(a, b), (a, b), expected):
        assert_close(actual, full.numpy().reshape(2 * 4, operand.size))


@both_conventions
def test_square_matrices_do_not_hide_a_forgotten_transpose(convention: Convention) -> None:
    """The one case in which shapes cannot tell W from its transpose, nor X from dY."""
    a, b, grad_y = matrices((3, 3, 3), whole=True)
    grad_a, grad_b = convention.rule(a, b, grad_y)
    right = ref.contract_backward(a, b, grad_y, convention.spec)
    assert_exact(grad_a, right[0])
    assert_exact(grad_b, right[1])
    for wrong in (grad_y @ b, b.T @ grad_y, b @ grad_y):
        assert not np.array_equal(grad_a, wrong)
    for wrong in (a @ grad_y, grad_y @ a.T, grad_y.T @ a):
        assert not np.array_equal(grad_b, wrong)


# The Jacobian that is too large.


@pytest.mark.parametrize(
    ("jacobians", "shapes"),
    [
        pytest.param(ref.jacobians_xw, [(64, 4096), (4096, 4096)], id="Y=XW"),
        pytest.param(ref.jacobians_wx, [(4096, 4096), (4096, 64)], id="Y=WX"),
    ],
)
def test_large_jacobian_is_refused_with_its_price(jacobians: Callable[..., Any], shapes: list[tuple[int, int]]) -> None:
    first, second = (np.broadcast_to(0.0, shape) for shape in shapes)  # no memory behind it
    with pytest.raises(ValueError) as refused:
        jacobians(first, second)
    message = str(refused.value)
    assert 64 * 4096 * 64 * 4096 == 68_719_476_736
    assert "262,144 × 262,144 = 68,719,476,736 numbers, 512 GiB in 8 bytes each (256 GiB in fp32)" in message
    assert 64 * 4096 * 4096 * 4096 == 4_398_046_511_104
    assert "262,144 × 16,777,216 = 4,398,046,511,104 numbers, 32 TiB in 8 bytes each (16 TiB in fp32)" in message
    assert "max_bytes = 67,108,864 (64 MiB)" in message
    assert "matmul_backward" in message


@both_conventions
def test_limit_is_the_memory_of_the_larger_jacobian(convention: Convention) -> None:
    a, b, _ = matrices((2, 3, 5))
    largest = max(jacobian.nbytes for jacobian in convention.jacobians(a, b))
    assert largest == 8 * (2 * 5) * (3 * 5)
    convention.jacobians(a, b, max_bytes=largest)
    with pytest.raises(ValueError, match=rf"max_bytes = {largest - 1:,} \(1.171 KiB\)"):
        convention.jacobians(a, b, max_bytes=largest - 1)


# Any letters.


@all_specs
def test_contraction_is_what_autograd_computes(spec: str) -> None:
    x, w, grad_y = tensors(spec)
    assert_close(ref.contract(x, w, spec), torch.einsum(spec, torch.tensor(x), torch.tensor(w)).numpy())
    expected = autograd(lambda x, w: torch.einsum(spec, x, w), grad_y, x, w)
    for actual, grad in zip(ref.contract_backward(x, w, grad_y, spec), expected):
        assert_close(actual, grad)


@all_specs
def test_contraction_is_the_measured_slope(spec: str) -> None:
    x, w, grad_y = tensors(spec, smallest=1, whole=True)
    grad_x, grad_w = ref.contract_backward(x, w, grad_y, spec)
    measured_x = ref.finite_difference(lambda x: ref.contract(x, w, spec), x, grad_y)
    measured_w = ref.finite_difference(lambda w: ref.contract(x, w, spec), w, grad_y)
    np.testing.assert_array_equal(measured_x, grad_x)
    np.testing.assert_array_equal(measured_w, grad_w)


@all_specs
def test_each_gradient_is_the_adjoint_of_the_product(spec: str) -> None:
    """⟨dY, X'W⟩ = ⟨dX, X'⟩ and ⟨dY, XW'⟩ = ⟨dW, W'⟩ for every X' and W': exactly, in integers."""
    x, w, grad_y = tensors(spec, whole=True)
    other_x, other_w, _ = tensors(spec, whole=True, seed=1)
    grad_x, grad_w = ref.contract_backward(x, w, grad_y, spec)
    assert grad_x.dtype == grad_w.dtype == np.int64
    assert np.sum(grad_y * ref.contract(other_x, w, spec)) == np.sum(grad_x * other_x)
    assert np.sum(grad_y * ref.contract(x, other_w, spec)) == np.sum(grad_w * other_w)


@pytest.mark.parametrize("spec", ["m->nm", "f->bsf", "sb->bsf", "nm->nm", "mn->nm", "->nm", "em->enm"])
def test_bias_is_what_autograd_computes(spec: str) -> None:
    b_letters, y_letters = spec.split("->")
    size = {letter: 2 + i for i, letter in enumerate(sorted(y_letters))}
    y_shape, b_shape = (tuple(size[letter] for letter in letters) for letters in (y_letters, b_letters))
    y, b, grad_y = random(y_shape, b_shape, y_shape)

    def forward(y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        order = [b_letters.index(letter) for letter in y_letters if letter in b_letters]
        shape = [size[letter] if letter in b_letters else 1 for letter in y_letters]
        return y + b.permute(order).reshape(shape)

    assert_close(ref.add_bias(y, b, spec), forward(torch.tensor(y), torch.tensor(b)).numpy())
    _, grad_b = autograd(forward, grad_y, y, b)
    actual = ref.bias_backward(grad_y, spec)
    assert_close(actual, grad_b)
    assert not np.shares_memory(actual, grad_y)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 3), (3, 1)], ids=str)
def test_bias_of_empty_and_single_rows(sizes: tuple[int, int]) -> None:
    (grad_y,) = random(sizes, whole=True)
    assert_exact(ref.bias_backward(grad_y, "m->nm"), grad_y.sum(axis=0))
    assert_exact(ref.add_bias(grad_y, grad_y.sum(axis=0), "m->nm"), grad_y + grad_y.sum(axis=0))


# Numbers.


def test_integers_beyond_float64_are_exact() -> None:
    big = 2**53 + 1  # the first integer that float64 cannot hold
    x, w, grad_y = np.array([[big]]), np.array([[3]]), np.array([[5]])
    assert ref.contract(x, w, "nd,dm->nm").item() == 3 * big
    for grad_w in (
        ref.matmul_backward_xw(x, w, grad_y)[1],
        ref.chain_rule_xw(x, w, grad_y)[1],
        ref.contract_backward(x, w, grad_y, "nd,dm->nm")[1],
    ):
        assert_exact(grad_w, np.array([[5 * big]]))
    assert_exact(ref.bias_backward(np.array([[big], [2]]), "m->nm"), np.array([big + 2]))
    assert_exact(ref.add_bias(np.array([[big]]), np.array([1]), "m->nm"), np.array([[big + 1]]))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.int64])
def test_narrow_integers_do_not_wrap(dtype: type[np.generic]) -> None:
    x = np.full((2, 300), 100, dtype)
    assert_exact(ref.contract(x, x.T, "nd,dm->nm"), np.full((2, 2), 300 * 100 * 100))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_narrow_floats_are_computed_in_float64(dtype: type[np.generic]) -> None:
    x = np.full((1, 4096), 1 + 2**-10, dtype)
    y = ref.contract(x, x, "nd,md->nm")
    assert y.dtype == np.float64
    assert y.item() == 4096 * (1 + 2**-10) ** 2


def test_integers_with_floats_are_floats() -> None:
    assert ref.contract(np.array([[2]]), np.array([[0.5]]), "nd,dm->nm").dtype == np.float64


@pytest.mark.parametrize("dtype", [bool, np.uint64, np.complex128, object])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(TypeError, match=r"w has dtype .*, which neither int64 nor float64 can hold"):
        ref.contract(np.ones((2, 2)), np.ones((2, 2), dtype), "nd,dm->nm")


def test_integers_that_could_wrap_are_refused() -> None:
    large = np.full((1, 4), 2**30)
    with pytest.raises(OverflowError, match="a sum of x times w may reach 4 · 1,073,741,824 · 1,073,741,824"):
        ref.contract(large, large.T, "nd,dm->nm")
    ref.contract(large[:, :3], large[:, :3].T, "nd,dm->nm")
    with pytest.raises(OverflowError, match="a sum of x times grad_y"):
        ref.matmul_backward_xw(large.T, np.ones((1, 1), int), large.T)
    with pytest.raises(OverflowError, match="a sum of grad_y may reach 4"):
        ref.bias_backward(np.full((4, 1), -(2**60)), "m->nm")


# Finite differences.


@pytest.mark.parametrize("step", [2.0**-20, 0.25, 1, 4, 2.0**20])
def test_no_step_truncates(step: float) -> None:
    """Rounding is what limits a difference here: the error is of order eps |L| / step, at any step."""
    x, w, grad_y = matrices((2, 3, 5))
    measured = ref.finite_difference(lambda x: x @ w, x, grad_y, step=step)
    np.testing.assert_allclose(measured, ref.matmul_backward_xw(x, w, grad_y)[0], rtol=0, atol=1e-13 * max(1, 1 / step))


def test_difference_is_exact_on_integers_at_any_whole_step() -> None:
    x, w, grad_y = matrices((2, 3, 5), whole=True)
    for step in (1, 2, 64):
        measured = ref.finite_difference(lambda w: x @ w, w, grad_y, step=step)
        np.testing.assert_array_equal(measured, ref.matmul_backward_xw(x, w, grad_y)[1])


def test_difference_leaves_its_operand_alone() -> None:
    x, w, grad_y = matrices((2, 3, 5))
    before = x.copy()
    ref.finite_difference(lambda x: x @ w, x, grad_y)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("step", [0, 3, -1, 0.1, float("inf"), float("nan")])
def test_step_that_rounds_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="is not a power of two"):
        ref.finite_difference(lambda x: x, np.ones(2), np.ones(2), step=step)


def test_step_between_integers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step = 0\.5 is not whole"):
        ref.finite_difference(lambda x: x, np.array([1]), np.array([1]), step=0.5)


def test_forward_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forward\(operand\) has shape \(2,\), but grad_y \(1,\)"):
        ref.finite_difference(lambda x: x, np.ones(2), np.ones(1))


# What is refused.


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nd,dm", "not of the form"),
        ("nd->nd", "not of the form"),
        ("nd,dm,m->n", "not letters only"),
        ("...d,dm->...m", "not letters only"),
        ("nn,nm->nm", "'nn' in .* repeats a letter"),
        ("nd,dm->n", "m stands in one tensor alone"),
        ("nd,dm->nmk", "k stands in one tensor alone"),
    ],
)
def test_spec_without_gradients_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ref.contract(np.ones((2, 2)), np.ones((2, 2)), spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("m", "not of the form"), ("k->nm", "B has k, which Y lacks"), ("mm->nm", "repeats a letter")],
)
def test_bias_spec_is_checked(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ref.bias_backward(np.ones((2, 2)), spec)


def test_sizes_that_disagree_are_refused_even_where_numpy_would_stretch_one() -> None:
    with pytest.raises(ValueError, match=r"d is 1 in w\[d,m\], but 3 in x\[n,d\]"):
        ref.contract(np.ones((2, 3)), np.ones((1, 4)), "nd,dm->nm")
    with pytest.raises(ValueError, match=r"m is 1 in grad_y\[n,m\], but 4 in w\[d,m\]"):
        ref.contract_backward(np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 1)), "nd,dm->nm")
    with pytest.raises(ValueError, match=r"m is 1 in b\[m\], but 4 in y\[n,m\]"):
        ref.add_bias(np.ones((2, 4)), np.ones(1), "m->nm")
    with pytest.raises(ValueError, match=r"x\[n,d\] has shape \(3,\)"):
        ref.matmul_backward_xw(np.ones(3), np.ones((3, 4)), np.ones((1, 4)))


@both_conventions
def test_matrices_that_do_not_fit_are_refused(convention: Convention) -> None:
    a, b, grad_y = matrices((2, 3, 5))
    for function in (convention.rule, convention.chain_rule):
        with pytest.raises(ValueError, match=r"is 5 in grad_y\[.,.\], but 2 in "):
            function(a, b, grad_y.T)
    with pytest.raises(ValueError, match=r"is 5 in .\[.,.\], but 3 in "):
        convention.jacobians(a, b.T)


# Shards.


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 6, 7])
def test_shards_are_those_of_torch_chunk(size: int, ranks: int) -> None:
    (whole,) = random((2, size))
    shards = ref.shard(whole, 1, ranks)
    chunks = [chunk.numpy() for chunk in torch.chunk(torch.tensor(whole), ranks, dim=1)]
    assert len(shards) == ranks
    for rank, block in enumerate(shards):
        np.testing.assert_array_equal(block, chunks[rank] if rank < len(chunks) else whole[:, :0], strict=True)
    np.testing.assert_array_equal(ref.all_gather(shards, 1), whole, strict=True)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks = 0 is less than 1"):
        ref.shard(np.ones(3), 0, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_reductions_sum_and_cut_as_shards_are_cut(ranks: int) -> None:
    partials = random(*[(5, 2)] * ranks, whole=True)
    total = partials[0].copy()
    for partial in partials[1:]:
        total += partial
    assert_exact(ref.all_reduce(partials), total)
    scattered = ref.reduce_scatter(partials, 0)
    assert [len(block) for block in scattered] == [len(block) for block in ref.shard(total, 0, ranks)]
    assert_exact(ref.all_gather(scattered, 0), total)


def test_partial_sums_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError):
        ref.all_reduce([np.ones((2, 3)), np.ones((3, 2))])


# The oracle stands alone.


def test_reference_imports_numpy_and_nothing_of_ours() -> None:
    assert ref.__file__ is not None
    program = (
        "import runpy, sys\n"
        "runpy.run_path(sys.argv[1])\n"
        "assert 'numpy' in sys.modules\n"
        "assert not {'torch', 'shardgrad'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program, ref.__file__], check=True, timeout=60)
