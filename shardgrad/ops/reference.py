"""The NumPy reference: the backward of a product, said in independent ways that must agree.

=====================  ==========================================================================
a transpose rule       `matmul_backward_xw`, `matmul_backward_wx`
the chain rule         `chain_rule_xw`, `chain_rule_wx`: one element at a time, in plain loops
an explicit Jacobian   `jacobians_xw`, `jacobians_wx`: small sizes only
a measured slope       `finite_difference`: knows the forward, nothing of its derivative
a contraction          `contract`, `contract_backward`, `add_bias`, `bias_backward`: any letters
shards                 `shard`, `all_gather`, `all_reduce`, `reduce_scatter`: ranks are list items
=====================  ==========================================================================

It imports NumPy and nothing else, so that torch and the rest of shardgrad can be tested against it.
Throughout, integers are computed in int64 and are exact, floats in float64; anything else is a TypeError,
sizes that disagree are a ValueError, and integers that could leave int64 an OverflowError. Gradients come
back in the order of the operands. docs/derivation.md derives what is stated here.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


# The transpose rules: swap X and dY, transpose W where it stands.


def matmul_backward_xw(x: ArrayLike, w: ArrayLike, grad_y: ArrayLike) -> tuple[Array, Array]:
    """Gradients of Y = XW: dX = dY Wᵀ and dW = Xᵀ dY.

    X[n,d], W[d,m], dY[n,m] -> dX[n,d], dW[d,m].
    """
    x, w, grad_y = _read(("x", "nd", x), ("w", "dm", w), ("grad_y", "nm", grad_y))
    return grad_y @ w.T, x.T @ grad_y


def matmul_backward_wx(w: ArrayLike, x: ArrayLike, grad_y: ArrayLike) -> tuple[Array, Array]:
    """Gradients of Y = WX: dW = dY Xᵀ and dX = Wᵀ dY.

    W[m,n], X[n,k], dY[m,k] -> dW[m,n], dX[n,k].
    """
    w, x, grad_y = _read(("w", "mn", w), ("x", "nk", x), ("grad_y", "mk", grad_y))
    return grad_y @ x.T, w.T @ grad_y


# The chain rule, element by element.


def chain_rule_xw(x: ArrayLike, w: ArrayLike, grad_y: ArrayLike) -> tuple[Array, Array]:
    """Gradients of Y = XW from Y[n,m] = Σ_d X[n,d] W[d,m], in as many steps as the Jacobian has entries.

    X[n,d], W[d,m], dY[n,m] -> dX[n,d], dW[d,m].
    """
    x, w, grad_y = _read(("x", "nd", x), ("w", "dm", w), ("grad_y", "nm", grad_y))

    def dy_dx(n: int, m: int, i: int, j: int) -> Any:
        return w[j, m] if n == i else 0

    def dy_dw(n: int, m: int, i: int, j: int) -> Any:
        return x[n, i] if m == j else 0

    return _chain_rule(grad_y, x.shape, dy_dx), _chain_rule(grad_y, w.shape, dy_dw)


def chain_rule_wx(w: ArrayLike, x: ArrayLike, grad_y: ArrayLike) -> tuple[Array, Array]:
    """Gradients of Y = WX from Y[m,k] = Σ_n W[m,n] X[n,k], in as many steps as the Jacobian has entries.

    W[m,n], X[n,k], dY[m,k] -> dW[m,n], dX[n,k].
    """
    w, x, grad_y = _read(("w", "mn", w), ("x", "nk", x), ("grad_y", "mk", grad_y))

    def dy_dw(m: int, k: int, i: int, j: int) -> Any:
        return x[j, k] if m == i else 0

    def dy_dx(m: int, k: int, i: int, j: int) -> Any:
        return w[m, i] if k == j else 0

    return _chain_rule(grad_y, w.shape, dy_dw), _chain_rule(grad_y, x.shape, dy_dx)


def _chain_rule(grad_y: Array, shape: tuple[int, ...], derivative: Callable[[int, int, int, int], Any]) -> Array:
    """dA[i,j] = Σ_{n,m} dY[n,m] ∂Y[n,m]/∂A[i,j], where derivative(n, m, i, j) is ∂Y[n,m]/∂A[i,j]."""
    grad = np.zeros(shape, grad_y.dtype)
    for i, j in np.ndindex(shape):
        for n, m in np.ndindex(grad_y.shape):
            grad[i, j] += grad_y[n, m] * derivative(n, m, i, j)
    return grad


# The Jacobian, to look at and to check with; nothing that trains should build it.


def jacobians_xw(x: ArrayLike, w: ArrayLike, *, max_bytes: int = 2**26) -> tuple[Array, Array]:
    """Jacobians of Y = XW: ∂vec(Y)/∂vec(X) = I_N ⊗ Wᵀ and ∂vec(Y)/∂vec(W) = X ⊗ I_M, vec row by row.

    X[n,d], W[d,m] -> a matrix of n·m rows and n·d columns, and one of n·m rows and d·m columns.
    ValueError where the larger one would take more than `max_bytes`. Source: vec(AXB) = (A ⊗ Bᵀ) vec(X) for
    a row-by-row vec (Magnus and Neudecker, Matrix Differential Calculus, ch. 2, there column by column).
    """
    x, w = _read(("x", "nd", x), ("w", "dm", w))
    (n, d), (_, m) = x.shape, w.shape
    _refuse_large((n, m), {"X": (n, d), "W": (d, m)}, max_bytes, remedy="matmul_backward_xw")
    return np.kron(np.eye(n, dtype=x.dtype), w.T), np.kron(x, np.eye(m, dtype=x.dtype))


def jacobians_wx(w: ArrayLike, x: ArrayLike, *, max_bytes: int = 2**26) -> tuple[Array, Array]:
    """Jacobians of Y = WX: ∂vec(Y)/∂vec(W) = I_M ⊗ Xᵀ and ∂vec(Y)/∂vec(X) = W ⊗ I_K, vec row by row.

    W[m,n], X[n,k] -> a matrix of m·k rows and m·n columns, and one of m·k rows and n·k columns.
    ValueError where the larger one would take more than `max_bytes`. Source: as `jacobians_xw`.
    """
    w, x = _read(("w", "mn", w), ("x", "nk", x))
    (m, n), (_, k) = w.shape, x.shape
    _refuse_large((m, k), {"W": (m, n), "X": (n, k)}, max_bytes, remedy="matmul_backward_wx")
    return np.kron(np.eye(m, dtype=x.dtype), x.T), np.kron(w, np.eye(k, dtype=x.dtype))


def _refuse_large(y: tuple[int, int], operands: dict[str, tuple[int, int]], max_bytes: int, *, remedy: str) -> None:
    rows = math.prod(y)
    numbers = {name: rows * math.prod(shape) for name, shape in operands.items()}
    if 8 * max(numbers.values()) <= max_bytes:
        return
    costs = "; ".join(
        f"∂vec(Y)/∂vec({name}) of Y[{y[0]},{y[1]}] and {name}[{shape[0]},{shape[1]}] is "
        f"{rows:,} × {math.prod(shape):,} = {numbers[name]:,} numbers, {_memory(8 * numbers[name])} "
        f"in 8 bytes each ({_memory(4 * numbers[name])} in fp32)"
        for name, shape in operands.items()
    )
    raise ValueError(
        f"the Jacobians would take more than max_bytes = {max_bytes:,} ({_memory(max_bytes)}): {costs}. "
        f"The gradients need neither: see {remedy}."
    )


def _memory(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"


# Finite differences: the slope of the loss, measured.


def finite_difference(
    forward: Callable[[Array], ArrayLike], operand: ArrayLike, grad_y: ArrayLike, *, step: float = 1
) -> NDArray[np.float64]:
    """Gradient of the loss ⟨dY, forward(operand)⟩ by central differences, one element after another.

    Where `forward` is linear in the operand, as a product is in each of its own, (L(a + h) − L(a − h)) / 2h
    is the slope for any h: there is no truncation error that a small step would have to keep down, and a
    large one loses the fewest digits. `step` must be a power of two, so that dividing by 2h rounds nothing:
    on integers the result is exact (below 2⁵³), on floats it is right up to the rounding of the forward.

    Any shapes; `forward` gets the operand as int64 or float64 and returns an array of `grad_y`'s shape. The
    gradient has the operand's shape, and is float64.
    """
    if math.frexp(step)[0] != 0.5:
        raise ValueError(f"step = {step} is not a power of two")
    (operand,) = _read(("operand", None, operand))
    (grad_y,) = _read(("grad_y", None, grad_y))
    if operand.dtype.kind == "i" and step != int(step):
        raise ValueError(f"step = {step} is not whole, and the operand's elements are integers")

    def loss(a: Array) -> Any:
        (y,) = _read(("forward(operand)", None, forward(a)))
        if y.shape != grad_y.shape:
            raise ValueError(f"forward(operand) has shape {y.shape}, but grad_y {grad_y.shape}")
        return sum(g * e for g, e in zip(grad_y.ravel().tolist(), y.ravel().tolist()))

    grad = np.zeros(operand.shape)
    for index in np.ndindex(operand.shape):
        above, below = operand.copy(), operand.copy()
        above[index] += operand.dtype.type(step)
        below[index] -= operand.dtype.type(step)
        grad[index] = (loss(above) - loss(below)) / (2 * step)
    return grad


# Any letters: one contraction, read with another tensor as the product.


def contract(x: ArrayLike, w: ArrayLike, spec: str) -> Array:
    """The product of `spec`, einsum subscripts such as "nd,dm->nm" or "bsd,fd->bsf".

    X and W have the shapes that `spec` spells, and so has the product. A letter stands at most once in a
    tensor, and in two tensors of the three (rows, contracted, columns) or in all (batched); otherwise
    ValueError, since one that stands alone has no place in the gradients' contractions.
    """
    x_letters, w_letters, y_letters = _parse(spec)
    x, w = _read(("x", x_letters, x), ("w", w_letters, w))
    return np.asarray(np.einsum(f"{x_letters},{w_letters}->{y_letters}", x, w))


def contract_backward(x: ArrayLike, w: ArrayLike, grad_y: ArrayLike, spec: str) -> tuple[Array, Array]:
    """Gradients of `contract(x, w, spec)`: dX[n,d] = Σ_m dY[n,m] W[d,m] and dW[d,m] = Σ_n X[n,d] dY[n,m].

    X, W and dY have the shapes that `spec` spells; dX has X's and dW has W's. `spec` as in `contract`.
    """
    x_letters, w_letters, y_letters = _parse(spec)
    x, w, grad_y = _read(("x", x_letters, x), ("w", w_letters, w), ("grad_y", y_letters, grad_y))
    grad_x = np.einsum(f"{y_letters},{w_letters}->{x_letters}", grad_y, w)
    grad_w = np.einsum(f"{x_letters},{y_letters}->{w_letters}", x, grad_y)
    return np.asarray(grad_x), np.asarray(grad_w)


def add_bias(y: ArrayLike, b: ArrayLike, spec: str) -> Array:
    """Y + B, repeated along the letters of Y that B lacks: `spec` is such as "m->nm", B's letters first.

    Repeating is a contraction with ones, Y[n,m] + 1[n,m] B[m], so the gradient is one too.
    """
    b_letters, y_letters = _parse_bias(spec)
    y, b = _read(("y", y_letters, y), ("b", b_letters, b), factors=1)
    return y + np.einsum(f"{y_letters},{b_letters}->{y_letters}", np.ones_like(y), b)


def bias_backward(grad_y: ArrayLike, spec: str) -> Array:
    """Gradient of `add_bias` for B: dB[m] = Σ_n 1[n,m] dY[n,m]. `spec` as there; dB has B's shape."""
    b_letters, y_letters = _parse_bias(spec)
    (grad_y,) = _read(("grad_y", y_letters, grad_y), factors=1)
    return np.asarray(np.einsum(f"{y_letters},{y_letters}->{b_letters}", np.ones_like(grad_y), grad_y))


def _parse(spec: str) -> tuple[str, str, str]:
    operands, _, y = spec.replace(" ", "").partition("->")
    x, comma, w = operands.partition(",")
    if "->" not in spec or not comma:
        raise ValueError(f"{spec!r} is not of the form 'nd,dm->nm'")
    for letters in (x, w, y):
        _check_letters(letters, spec)
    for letter in sorted({*x, *w, *y}):
        if sum(letter in letters for letters in (x, w, y)) < 2:
            raise ValueError(f"in {spec!r}, {letter} stands in one tensor alone")
    return x, w, y


def _parse_bias(spec: str) -> tuple[str, str]:
    b, arrow, y = spec.replace(" ", "").partition("->")
    if not arrow:
        raise ValueError(f"{spec!r} is not of the form 'm->nm'")
    for letters in (b, y):
        _check_letters(letters, spec)
    if alien := sorted({*b} - {*y}):
        raise ValueError(f"in {spec!r}, B has {', '.join(alien)}, which Y lacks")
    return b, y


def _check_letters(letters: str, spec: str) -> None:
    if not all(letter.isascii() and letter.isalpha() for letter in letters):
        raise ValueError(f"{letters!r} in {spec!r} is not letters only")
    if len({*letters}) < len(letters):
        raise ValueError(f"{letters!r} in {spec!r} repeats a letter")


# Shards, with no processes: a list has one block for each rank, and a collective is what it computes.


def shard(tensor: ArrayLike, dim: int, ranks: int, *, balanced: bool = False) -> list[Array]:
    """Views of `tensor`, sharded along `dim` as torch.chunk shards: ⌈size/ranks⌉ each, the last ones less or empty;
    balanced ones as np.array_split does, the first size mod ranks one more than the others.

    Unlike torch.chunk, which may return fewer, there is one shard for each rank. ValueError if ranks < 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks = {ranks} is less than 1")
    (array,) = _read(("tensor", None, tensor))
    if balanced:
        return np.array_split(array, ranks, axis=dim)
    size = array.shape[dim]
    chunk = -(-size // ranks)
    return np.split(array, [min(rank * chunk, size) for rank in range(1, ranks)], axis=dim)


def all_gather(shards: Sequence[ArrayLike], dim: int) -> Array:
    """What every rank holds after an all-gather: the shards side by side. The inverse of `shard`."""
    return np.concatenate(_read_blocks(shards), axis=dim)


def all_reduce(partials: Sequence[ArrayLike]) -> Array:
    """What every rank holds after an all-reduce: the sum of the partial sums, all of one shape."""
    return np.sum(_read_blocks(partials), axis=0)


def reduce_scatter(partials: Sequence[ArrayLike], dim: int, *, balanced: bool = False) -> list[Array]:
    """What each rank holds after a reduce-scatter: its own shard of that sum."""
    return shard(all_reduce(partials), dim, len(partials), balanced=balanced)


def _read_blocks(blocks: Sequence[ArrayLike]) -> list[Array]:
    return _read(*((f"the block of rank {rank}", None, block) for rank, block in enumerate(blocks)), factors=1)


# Operands.


def _read(*tensors: tuple[str, str | None, ArrayLike], factors: int = 2) -> list[Array]:
    """The arrays of (name, letters or None for any shape, array), checked, all in int64 or all in float64.

    `factors`: how many of them are multiplied together before sums are taken.
    """
    arrays = [np.asarray(array) for _, _, array in tensors]
    for (name, _, _), array in zip(tensors, arrays):
        if array.dtype.kind not in "iuf" or not np.can_cast(array.dtype, _computed_in(array)):
            raise TypeError(f"{name} has dtype {array.dtype}, which neither int64 nor float64 can hold")
    dtype = np.result_type(*map(_computed_in, arrays))
    arrays = [array.astype(dtype, copy=False) for array in arrays]

    seen: dict[str, tuple[int, str]] = {}
    for (name, letters, _), array in zip(tensors, arrays):
        if letters is None:
            continue
        # np.einsum would stretch a size of 1 to fit, and so hide a wrong shape.
        spelled = f"{name}[{','.join(letters)}]"
        if array.ndim != len(letters):
            raise ValueError(f"{spelled} has shape {array.shape}")
        for letter, size in zip(letters, array.shape):
            known, where = seen.setdefault(letter, (size, spelled))
            if size != known:
                raise ValueError(f"{letter} is {size} in {spelled}, but {known} in {where}")
    if dtype == np.int64:
        _refuse_overflow([(name, letters or "", a) for (name, letters, _), a in zip(tensors, arrays)], factors)
    return arrays


def _computed_in(array: Array) -> type[np.generic]:
    return np.float64 if array.dtype.kind == "f" else np.int64


def _refuse_overflow(tensors: Sequence[tuple[str, str, Array]], factors: int) -> None:
    """NumPy's integers wrap around in silence: refuse what a sum of products of `factors` tensors could."""
    for chosen in combinations(tensors, factors):
        summed = set.intersection(*({*letters} for _, letters, _ in chosen))
        _, letters, array = chosen[0]
        terms = math.prod(size for letter, size in zip(letters, array.shape) if letter in summed)
        largest = [max(abs(int(a.min(initial=0))), abs(int(a.max(initial=0)))) for _, _, a in chosen]
        if terms * math.prod(largest) >= 2**62:
            names = " times ".join(name for name, _, _ in chosen)
            bound = " · ".join(f"{n:,}" for n in (terms, *largest))
            raise OverflowError(f"a sum of {names} may reach {bound}, too near to what int64 holds: pass floats")
