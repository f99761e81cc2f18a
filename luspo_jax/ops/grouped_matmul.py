"""Matrix products of experts: rows sorted by group, each group times its own kernel.

| name | platform | what it is |
|---|---|---|
| reference | all | every row times every kernel, masked (`reference_grouped_matmul`) |
| blocks | all, made for CPU | a loop over pieces of groups (`block_matmul`) |
| megablox | TPU | the Pallas kernels that come with jax (`megablox_matmul`) |
| grouped_gpu | GPU | Pallas kernels through Triton (`gpu_grouped_matmul`) |

Groups follow one another from row 0, in order. Each begins at a multiple of `row_multiple`, so its
last rows may be padding, which the caller sets to zero. Rows after the last group belong to no
group: their contents, NaN included, have no effect, and their results are meaningless.

The derivatives of each of the two functions are again these two functions. So derivatives exist in
reverse mode to any order, with every implementation, and keep only the inputs.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from luspo_jax.ops.reference_grouped_matmul import kept

__all__ = ["IMPLEMENTATIONS", "grouped_matmul", "grouped_outer", "resolve", "row_multiple"]

# Modules with `matmul`, `outer` and `row_multiple`; imported when used, as Pallas imports slowly.
IMPLEMENTATIONS = {
    "reference": "reference_grouped_matmul",
    "blocks": "block_matmul",
    "megablox": "megablox_matmul",
    "grouped_gpu": "gpu_grouped_matmul",
}
_GPUS = ("gpu", "cuda", "rocm")
_PLATFORMS = {"megablox": ("tpu",), "grouped_gpu": _GPUS}  # of implementations with fixed platforms


def grouped_matmul(
    x_MD, kernel_EDF, group_sizes_E, *, implementation="reference", transposed=False
) -> jax.Array:
    """Returns y_m = x_m W_e, where e is the group of row m.

    Args:
      x_MD: rows, group by group; x_MF if `transposed`.
      kernel_EDF: a kernel for each group, in the type of the rows; or int8, which is multiplied as
        the numbers it has, in the type of the rows, and has no gradient.
      group_sizes_E: int32 rows of each group, multiples of `row_multiple`, 0 allowed; their sum is
        at most M.
      implementation: a key of IMPLEMENTATIONS, from `resolve`.
      transposed: y_m = x_m W_eᵀ instead.

    Returns:
      [M, F] ([M, D] if `transposed`) in the type of the rows, with sums in float32 (float64 for
      float64); unspecified after the last group.

    Raises:
      ValueError: an unknown implementation, or incompatible shapes or types.
    """
    _check(implementation, x_MD, group_sizes_E)
    if kernel_EDF.ndim != 3 or x_MD.shape[1] != kernel_EDF.shape[2 if transposed else 1]:
        raise ValueError(
            f"grouped_matmul of rows {x_MD.shape} with kernels {kernel_EDF.shape}: kernels must be "
            f"[groups, {'any, ' if transposed else ''}{x_MD.shape[1]}{'' if transposed else ', any'}]"  # noqa: E501
        )
    _check_groups("kernels", kernel_EDF.shape[0], group_sizes_E)
    if kernel_EDF.dtype not in (x_MD.dtype, jnp.int8):
        raise ValueError(
            f"grouped_matmul of {x_MD.dtype} rows with {kernel_EDF.dtype} kernels: "
            f"cast the kernels to the type of the rows"
        )
    return _matmul(implementation, transposed, x_MD, kernel_EDF, group_sizes_E)


def grouped_outer(x_MD, grad_MF, group_sizes_E, *, implementation="reference") -> jax.Array:
    """Returns G_e = Σ_{m in group e} x_mᵀ g_m: the gradient of the kernels of `grouped_matmul`.

    Args:
      x_MD: rows, group by group.
      grad_MF: as many rows of the same type.
      group_sizes_E: int32 rows of each group, as in `grouped_matmul`.
      implementation: a key of IMPLEMENTATIONS, from `resolve`.

    Returns:
      [E, D, F], with sums and result in float32 (float64 for float64); zero for an empty group.

    Raises:
      ValueError: an unknown implementation, or incompatible shapes or types.
    """
    _check(implementation, x_MD, group_sizes_E)
    if grad_MF.ndim != 2 or grad_MF.shape[0] != x_MD.shape[0] or grad_MF.dtype != x_MD.dtype:
        raise ValueError(
            f"grouped_outer of rows {x_MD.dtype}{list(x_MD.shape)} with "
            f"{grad_MF.dtype}{list(grad_MF.shape)}: both must be matrices of one type with as many "
            f"rows"
        )
    return _outer(implementation, x_MD, grad_MF, group_sizes_E)


def row_multiple(implementation: str, num_rows: int, num_groups: int) -> int:
    """Returns the required divisor of each group's size, so that groups begin where tiles do.

    Args:
      implementation: a key of IMPLEMENTATIONS, from `resolve`.
      num_rows: rows of all groups together, before padding.
      num_groups: E.

    Raises:
      ValueError: an unknown implementation.
    """
    _check_name(implementation)
    return _module(implementation).row_multiple(num_rows, num_groups)


def resolve(implementation: str, *, platform: str) -> str:
    """Resolves "auto" to an implementation, and refuses one that does not run on the platform.

    "auto" is blocks on CPU, megablox on TPU, grouped_gpu on GPU and the reference elsewhere.

    Args:
      implementation: "auto" or a key of IMPLEMENTATIONS.
      platform: platform of the devices ("cpu", "tpu", "gpu", "cuda", "rocm").

    Returns:
      A key of IMPLEMENTATIONS.

    Raises:
      ValueError: an unknown implementation, or one of another platform; the message lists this
        platform's.
    """
    if implementation == "auto":
        fit = (name for name, platforms in _PLATFORMS.items() if platform in platforms)
        return next(fit, "blocks" if platform == "cpu" else "reference")
    _check_name(implementation, "'auto' or ")
    if platform not in _PLATFORMS.get(implementation, (platform,)):
        able = [name for name in IMPLEMENTATIONS if platform in _PLATFORMS.get(name, (platform,))]
        raise ValueError(
            f"grouped matmul implementation {implementation!r} runs on "
            f"{' or '.join(_PLATFORMS[implementation])}, not on {platform}; "
            f"there {', '.join(map(repr, able))} do (or 'auto')"
        )
    return implementation


# ---------------------------------------------------------------- derivatives
# Rows after the last group get a zero gradient, whatever the implementation leaves there.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation, transposed, x_MD, kernel_EDF, group_sizes_E):
    matmul = _module(implementation).matmul
    return matmul(x_MD, kernel_EDF, group_sizes_E, transposed=transposed)


def _matmul_forward(implementation, transposed, *arrays):
    return _matmul(implementation, transposed, *arrays), arrays


def _matmul_backward(implementation, transposed, arrays, grad_MF):
    x_MD, kernel_EDF, group_sizes_E = arrays
    grad_x_MD = _matmul(implementation, not transposed, grad_MF, kernel_EDF, group_sizes_E)
    factors = (grad_MF, x_MD) if transposed else (x_MD, grad_MF)
    grad_kernel_EDF = _outer(implementation, *factors, group_sizes_E).astype(kernel_EDF.dtype)
    return _known(grad_x_MD, group_sizes_E), grad_kernel_EDF, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(implementation, x_MD, grad_MF, group_sizes_E):
    return _module(implementation).outer(x_MD, grad_MF, group_sizes_E)


def _outer_forward(implementation, *arrays):
    return _outer(implementation, *arrays), arrays


def _outer_backward(implementation, arrays, grad_EDF):
    x_MD, grad_MF, group_sizes_E = arrays
    grad_EDF = grad_EDF.astype(x_MD.dtype)
    grad_x_MD = _matmul(implementation, True, grad_MF, grad_EDF, group_sizes_E)
    grad_grad_MF = _matmul(implementation, False, x_MD, grad_EDF, group_sizes_E)
    return _known(grad_x_MD, group_sizes_E), _known(grad_grad_MF, group_sizes_E), None


_outer.defvjp(_outer_forward, _outer_backward)


def _known(grad_MD, group_sizes_E):
    return kept(grad_MD, 0, jnp.sum(group_sizes_E, dtype=jnp.int32))


# ---------------------------------------------------------------- checks and choice


def _module(implementation):
    return importlib.import_module(f"luspo_jax.ops.{IMPLEMENTATIONS[implementation]}")


def _check_name(implementation, alternative=""):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped matmul implementation {implementation!r} is unknown; "
            f"use {alternative}one of {sorted(IMPLEMENTATIONS)}"
            + (", as ops.grouped_matmul.resolve chooses" if implementation == "auto" else "")
        )


def _check(implementation, x_MD, group_sizes_E):
    _check_name(implementation)
    if x_MD.ndim != 2:
        raise ValueError(f"rows of a grouped matmul are a matrix [M, D], not {list(x_MD.shape)}")
    if x_MD.dtype == jnp.float64 and implementation in _PLATFORMS:
        raise ValueError(
            f"grouped matmul implementation {implementation!r} does not take float64; use "
            f"'blocks' or 'reference'"
        )
    if group_sizes_E.ndim != 1 or group_sizes_E.dtype != jnp.int32:
        raise ValueError(
            f"group sizes are an int32 vector, not {group_sizes_E.dtype}{list(group_sizes_E.shape)}"
        )


def _check_groups(what, count, group_sizes_E):
    if group_sizes_E.shape[0] != count:
        raise ValueError(
            f"{count} {what} of a grouped matmul for {group_sizes_E.shape[0]} group sizes: "
            f"they must be as many"
        )
