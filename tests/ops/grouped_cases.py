"""Groups of rows, and what their products must be: a float64 loop over the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from luspo_jax.ops import grouped_matmul as module

# Rows of each group, as multiples of what the implementation asks for.
SIZES = {
    "random": [3, 0, 1, 7, 2],
    "one has all": [0, 0, 9, 0],
    "none has any": [0, 0, 0],
    "last is empty": [5, 1, 0],
    "single": [4],
}


def inputs(sizes, multiple, D, F, dtype=jnp.float32, spare=1, seed=0):
    """x_MD, kernel_EDF, grad_MF, group_sizes_E; `spare` multiples of NaN rows after the last."""
    rng = np.random.default_rng(seed)
    sizes_E = np.asarray(sizes, np.int32) * multiple
    M = int(sizes_E.sum()) + spare * multiple
    x_MD, grad_MF = rng.standard_normal((M, D)), rng.standard_normal((M, F))
    x_MD[sizes_E.sum() :] = grad_MF[sizes_E.sum() :] = np.nan
    kernel_EDF = rng.standard_normal((len(sizes), D, F)) / np.sqrt(D)
    arrays = (jnp.asarray(a, dtype) for a in (x_MD, kernel_EDF, grad_MF))
    return *arrays, jnp.asarray(sizes_E)


def expected(x_MD, kernel_EDF, grad_MF, sizes_E):
    """(x W, g Wᵀ, xᵀ g) of the rows that belong to a group."""
    x, kernel, grad = (np.asarray(a.astype(jnp.float32), np.float64)
                       if a.dtype == jnp.bfloat16 else np.asarray(a, np.float64)
                       for a in (x_MD, kernel_EDF, grad_MF))  # fmt: skip
    outs, backs, outers, start = [], [], [], 0
    for e, size in enumerate(np.asarray(sizes_E)):
        here = slice(start, start + size)
        outs.append(x[here] @ kernel[e])
        backs.append(grad[here] @ kernel[e].T)
        outers.append(x[here].T @ grad[here])
        start += size
    return np.concatenate(outs), np.concatenate(backs), np.stack(outers)


def computed(implementation, x_MD, kernel_EDF, grad_MF, sizes_E):
    """The same by the implementation."""

    @jax.jit
    def both(x, kernel, grad, sizes):
        how = {"implementation": implementation}
        return (
            module.grouped_matmul(x, kernel, sizes, **how),
            module.grouped_matmul(grad, kernel, sizes, transposed=True, **how),
            module.grouped_outer(x, grad, sizes, **how),
        )

    out, back, outer = both(x_MD, kernel_EDF, grad_MF, sizes_E)
    assert out.dtype == back.dtype == x_MD.dtype
    assert outer.dtype == (jnp.float64 if x_MD.dtype == jnp.float64 else jnp.float32)
    rows = int(sizes_E.sum())
    return tuple(np.asarray(a, np.float64) for a in (out[:rows], back[:rows], outer))


def error(got, want):
    """Largest difference over the largest value."""
    scale = max(float(np.max(np.abs(a), initial=0.0)) for a in want) or 1.0
    return (
        max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(got, want, strict=True))
        / scale
    )


def assert_groups_are_right(implementation, name, D, F, dtype=jnp.float32, most=1e-6):
    """All three products, with groups that are empty exactly zero in the outer one."""
    multiple = module.row_multiple(implementation, sum(SIZES[name]) + 1, len(SIZES[name]))
    arrays = inputs(SIZES[name], multiple, D, F, dtype)
    got = computed(implementation, *arrays)
    assert error(got, expected(*arrays)) < most
    assert not got[2][np.asarray(SIZES[name]) == 0].any()


def assert_int8_kernels_are_right(implementation, dtype, most):
    """Rows times integers, in the type of the rows."""
    multiple = module.row_multiple(implementation, 33, 5)
    x_MD, _, _, sizes_E = inputs([20, 0, 1, 12], multiple, 24, 40, dtype)
    integers = np.random.default_rng(1).integers(-127, 128, (4, 24, 40))
    kernel_EDF = jnp.asarray(integers, jnp.int8)
    y_MF = jax.jit(functools.partial(module.grouped_matmul, implementation=implementation))(
        x_MD, kernel_EDF, sizes_E
    )
    assert y_MF.dtype == dtype
    rows = int(sizes_E.sum())
    want = expected(x_MD[:rows], kernel_EDF, jnp.zeros((rows, 40), dtype), sizes_E)[0]
    assert error([np.asarray(y_MF[:rows].astype(jnp.float32), np.float64)], [want]) < most
