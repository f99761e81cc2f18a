"""Forward passes of a run: which kernels they take on the devices there are."""

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import kernels
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.quantised import activation_type
from luspo_jax.run import adapters
from luspo_jax.run.settings import Config
from luspo_jax.sharding import Layout


def training(config: Config, model: DecoderConfig, layout: Layout | None) -> Forward:
    """Returns the forward pass of the trainer on this platform."""
    used = {"dtype": config.model.dtype, "remat": config.model.remat}
    used["adapter"] = adapters.adapter(config, model)
    used["products"] = config.model.products
    used["branches"] = shares_prompts(config, model, layout)
    return _forward(config, model, layout, packed=config.train.packing, **used)


def shares_prompts(config: Config, model: DecoderConfig, layout: Layout | None) -> bool:
    """Returns whether training rows hold a prompt once for several of its responses."""
    return not why_not_shared(config, model, layout)


def why_not_shared(config: Config, model: DecoderConfig, layout: Layout | None) -> str:
    """Returns why every response has a prompt of its own in training rows; "" if they share."""
    asked = getattr(config.train, "share_prompts", None)  # supervised fine-tuning has no groups
    if asked is None or asked == "off":
        return "train.share_prompts=off"
    if not config.train.packing:
        return "rows hold one response each, train.packing=False"
    if config.rollout.group_size == 1:
        return "a prompt has one response"
    if asked == "on":
        return ""
    if config.train.router_aux_coef:
        return "train.router_aux_coef balances experts over every response's own tokens"
    how = _forward(config, model, layout, packed=True, dtype=config.model.dtype)
    if how.attention == "splash":
        return "splash attention would run twice; train.share_prompts=on does it"
    return ""


def gathers(config: Config, model: DecoderConfig, layout: Layout | None) -> bool:
    """Returns whether attention gathers the sequences of packed rows, as no kernel skips others."""
    if not config.train.packing or layout is not None:
        return False
    how = _forward(config, model, layout, packed=True, dtype=config.model.dtype)
    return how.attention == "reference"


def sampling(config: Config, model: DecoderConfig, layout: Layout | None) -> Forward:
    """Returns the forward pass of the sampler; rows hold one prompt each."""
    dtype = activation_type(config.model.rollout_dtype)
    rollout = getattr(config, "rollout", None)  # supervised fine-tuning has none
    apart = rollout is not None and rollout.lora == "apart"
    made = adapters.adapter(config, model) if apart else None
    return _forward(config, model, layout, packed=False, dtype=dtype, adapter=made)


def _forward(config, model, layout, *, packed, branches=False, **settings):
    how = Forward(
        model,
        attention=config.model.attention,
        vision_attention=config.model.attention,
        expert_kernel=config.model.expert_kernel,
        layout=layout,
        **settings,
    )
    try:
        return kernels.resolved(how, packed=packed, branches=branches)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
