"""Which kernels a forward pass takes: "auto" and other names decided for the devices there are."""

import dataclasses

from luspo_jax import sharding
from luspo_jax.models.forward import Forward
from luspo_jax.ops import attention, grouped_matmul


def resolved(how: Forward, *, packed: bool = False, branches: bool = False) -> Forward:
    """`how` with the kernels that are meant on the platform of its layout.

    Args:
      how: each kernel is "auto" or a name.
      packed: whether a row may hold more than one segment.
      branches: whether responses may share the prompt before them.

    Raises:
      ValueError: beginning with the field whose name is unknown, or of a kernel that does not fit.
    """
    needs = {"platform": _platform(how.layout), "dtype": how.dtype}
    return dataclasses.replace(
        how,
        attention=_checked(
            "attention",
            attention.resolve,
            how.attention,
            packed=packed,
            branches=branches,
            head_dim=how.model.head_dim,
            context=how.layout.size("length") if how.layout else 1,
            **needs,
        ),
        vision_attention=_vision_attention(how, needs),
        paged_attention="reference" if how.attention == "reference" else "auto",
        expert_kernel=_checked(
            "expert_kernel", grouped_matmul.resolve, how.expert_kernel, platform=needs["platform"]
        ),
    )


def _vision_attention(how, needs):
    """The tower's attention over an image; its heads have a size of their own.

    Patches are not one run in their slots, as a packed row's tokens are not: what reads segment ids
    is needed. "reference" is kept, of any other name what fits the platform is taken.
    """
    tower = how.model.vision
    if tower is None or how.vision_attention == "reference":
        return "reference"
    return attention.resolve("auto", packed=True, head_dim=tower.head_dim, **needs)


def _checked(field, resolve, name, **needs):
    try:
        return resolve(name, **needs)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _platform(layout):
    return (layout.mesh.devices.flat[0] if layout else sharding.available_devices()[0]).platform
