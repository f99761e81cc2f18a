"""Supervised fine-tuning on demonstrations: a warm start for RL.

  python -m experiments.sft --config=configs/sft_label_sums.py --workdir=DIR

Any field of the configuration can be set by flag: `--config.data.path=answers.jsonl`. Running the
same command again resumes the run, bit for bit. `--dry_run` prints what would run, and stops. The
folder DIR/export is then a model for `experiments.train` (`--config.model.path=DIR/export`).

On several hosts: as `experiments.train`, with the same flags.
"""

import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import cluster, command

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, export.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved run and stop.")


def main() -> None:
    """Runs what the flags say."""
    # Imports after flags are parsed: a typo answers at once.
    from luspo_jax.hosts import guard, processes
    from luspo_jax.run import workdir as workdirs
    from luspo_jax.run.sft.build import build, facts
    from luspo_jax.run.sft.loop import fine_tune

    config, several = command.config_value(_CONFIG), cluster.arguments()
    workdirs.check_place(_WORKDIR.value or "")
    if several is not None:
        cluster.join(config, several, None if _DRY_RUN.value else _WORKDIR.value)
    with guard.phase("build"):
        run = build(config)
        if processes.is_writer():
            print(description(run))
    if _DRY_RUN.value:
        processes.stop()
        return
    try:
        with workdirs.Workdir(_WORKDIR.value, config, facts(run)) as workdir:
            outcome = fine_tune(run, workdir)
    except guard.Preempted:
        processes.stop()  # together: jax aborts the others when process 0 is gone
        raise
    if processes.is_writer():
        print(f"before: {outcome.base}\nafter : {outcome.final}")
        if outcome.export:
            print(f"export: {outcome.export}")
    processes.stop()


def description(run: Any) -> str:
    """Describes the resolved run: configuration, data, batches, parameters, memory."""
    import jax

    from luspo_jax.models import decoder_weights
    from luspo_jax.run import fields
    from luspo_jax.run.memory import pass_memory, state_memory

    settings, how, model = run.settings, run.rule.logprobs.how, run.model.config
    tokens = settings.rows_per_microbatch * settings.row_length
    held = state_memory(model, how.layout, how.adapter)
    memory = held | pass_memory(settings, model, how.layout, tokens)
    shown = {k: v for k, v in fields.flat(run.config).items() if v is not None and v != ""}
    steps, train = settings.num_steps, settings.train
    epochs = steps * train.batch_size / len(run.data.stream)
    rows = "packed rows" if train.packing else "rows"
    lines = [
        *(f"  {name} = {value}" for name, value in shown.items()),
        f"objective : negative log-likelihood of "
        f"{'all tokens' if settings.data.train_on_prompt else 'answers'}, {train.aggregation}",
        f"device(s) : {jax.device_count()} × {jax.devices()[0].device_kind}; training "
        f"{command.mesh_sizes(how.layout)}; answers {command.mesh_sizes(run.rollout_layout)}; "
        f"attention {how.attention}",
        f"model     : {run.model.folder.name}, {decoder_weights.num_params(model):,} parameters"
        + ("" if run.model.stop_token_ids else "; NO TOKEN ENDS AN ANSWER: none learns to end"),
        f"training  : {run.data.described['training']}",
        f"held out  : {run.data.described.get('held out', 'nothing')}; "
        f"{len(run.data.asked):,} prompts answered",
        f"batch     : {steps} steps × {train.batch_size} demonstrations = {epochs:.2f} epochs; "
        f"micro-batches of {settings.rows_per_microbatch} {rows} × up to {settings.row_length} "
        "tokens",
        f"memory    : about {sum(memory.values()) / 1e9:.2f} GB a device: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if size),
    ]
    return "\n".join(["configuration", *lines])


if __name__ == "__main__":
    sys.exit(cluster.call(main, required=("config", "workdir"), config="default_sft_config"))
