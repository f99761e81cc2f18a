"""Accuracy of a rehearsal: its predictions beside measurements, on the local CPU devices.

`python -m experiments.studies.rehearsal.calibrate --devices=8 --out=FILE.json`

It compiles every program of a small run as in a rehearsal, and then runs it on arrays of its
shapes. Bytes: what arrays take on a device, and how much the process grows while the program runs,
all devices together, compared with temporaries and new results. Seconds: the best of three,
compared with the roofline of rates measured in the same process (products and additions in
float32), and for programs of training with the sum over their instructions at these rates.
"""

import gc
import json
import pathlib
import sys
import threading
import time

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_DEVICES = flags.DEFINE_integer("devices", 1, "Fake CPU devices.", 1)
_OUT = flags.DEFINE_string("out", None, "File for the table as JSON.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")
_ONLY = flags.DEFINE_list("only", [], "Programs to run; empty = all but those held out.")


def main() -> None:
    """Runs every program and prints the table."""
    files.check_file(_OUT.value, flag="--out", overwrite=_OVERWRITE.value)
    import jax

    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    from experiments.rehearsal import case as cases
    from experiments.rehearsal import programs, report, topologies

    topology = topologies.topology("local")
    case = cases.build(configuration(), topology, mean_length=_MEAN)
    rows = []
    for program in programs.programs(case):
        if program.name.endswith("(held out)") or (_ONLY.value and program.name not in _ONLY.value):
            continue
        predicted = report.record(topology, program, programs.compiled(program))
        rows.append({"program": program.name, **measured(case, program, predicted)})
        print(json.dumps(rows[-1]), flush=True)
    found = {"devices": _DEVICES.value, "chip": topology.chip.source, "programs": rows,
             "flops": topology.chip.flops, "bandwidth": topology.chip.bandwidth}  # fmt: skip
    files.write_new(_OUT.value, json.dumps(found, indent=2) + "\n", overwrite=_OVERWRITE.value)
    print(table(found))


_MEAN = 240.0


def configuration():
    """A run of 12 million parameters, with rows of 1,024 tokens."""
    from luspo_jax.run.fields import default_config

    config = default_config()
    config.model.path = "embedded:label_sums"
    config.model.random_weights = True
    config.model.remat = "full"
    config.model.head_chunk_tokens = 512
    config.model.overrides = {
        "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 48, "vocab_size": 4096,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    config.model.rollout_dtype = "float32"
    config.data.name = "label_sums"
    config.data.max_prompt_length = 64
    config.reward.parts = {"gsm8k": 1.0}
    config.rollout.prompts_per_step = 8
    config.rollout.max_response_length = 960
    config.rollout.num_slots = 32
    config.train.num_minibatches = 2
    config.train.packing = True
    config.train.microbatch_tokens = 8 * 1024
    config.train.num_length_buckets = 1
    return config


def measured(case, program, predicted):
    """Measures bytes and seconds of a program on real arrays, beside the predictions."""
    import jax

    lowered = program.lower()
    compiled = lowered.compile()
    size = predicted["bytes"]
    count = len(case.topology.devices)
    grown, seconds = [], []
    for _ in range(3):
        arguments, own = jax.block_until_ready(_arrays(lowered, compiled, case))
        gc.collect()
        with _Growth() as growth:
            started = time.perf_counter()
            results = jax.block_until_ready(compiled(*arguments[0], **arguments[1]))
            seconds.append(time.perf_counter() - started)
        grown.append(growth.bytes / count)
        del arguments, results
    later = grown[1:]  # the first run also loads code and the libraries' own scratch, once
    new = size["temporaries"] + size["outputs"] - size["aliased"]
    return {
        "predicted_argument_bytes": size["arguments"],
        "measured_argument_bytes": own,
        "predicted_new_bytes": new,
        "measured_new_bytes": max(later),
        "growth_of_each_run": grown,
        "predicted_peak_bytes": size["arguments"] + new,
        "measured_peak_bytes": own + max(later),
        "roofline_s": predicted["roofline_s"],
        "counted_s": predicted["counted"]["seconds"] if predicted["counted"] else None,
        "bound": predicted["bound"],
        "measured_s": min(seconds),
    }


def _arrays(lowered, compiled, case):
    """Returns arguments for a program's full work, and a device's bytes of those it reads."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def made(path, info, where):
        shape, dtype = info.shape, info.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            key = jax.random.key(0, impl="threefry2x32")
            return jax.device_put(jnp.broadcast_to(key, shape), where)
        if dtype == np.bool_:
            value = np.full(shape, "drawn_B" not in str(path))
        elif np.issubdtype(dtype, np.integer):
            value = np.full(shape, case.engine.chunk_length if not shape else 0, dtype)
            if "limits_B" in str(path) or "counts_R" in str(path):  # whole runs, and no end
                value = np.full(shape, 10**6, dtype)
        else:
            value = (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)
        return jax.device_put(value, where)

    def absent(one):  # an empty field, or an unread input
        return one is None

    infos, treedef = jax.tree.flatten_with_path(lowered.args_info, is_leaf=absent)
    where = jax.tree.leaves(compiled.input_shardings, is_leaf=absent)
    pairs = list(zip(infos, where, strict=True))
    arrays = [info and made(path, info, one) for (path, info), one in pairs]
    read = [x for x, one in zip(arrays, where, strict=True) if one is not None]
    own = sum(x.addressable_shards[0].data.nbytes for x in read)
    return treedef.unflatten(arrays), own


class _Growth:
    """Measures the largest growth of this process's resident memory, sampled every 0.5 ms."""

    def __enter__(self):
        self._stop, self._before = threading.Event(), _resident()
        self.bytes, self._thread = 0, threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(5e-4):
            self.bytes = max(self.bytes, _resident() - self._before)

    def __exit__(self, *_):
        self.bytes = max(self.bytes, _resident() - self._before)
        self._stop.set()
        self._thread.join()


def _resident():
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])


def table(found):
    """Formats the measurements as a Markdown table; MB of one device."""
    lines = [
        "| program | arguments, predicted | measured | temporaries and results, predicted "
        "| measured | peak, predicted ÷ measured | roofline | by instructions | measured | bound |",
        "|---|" + "---:|" * 8 + "---|",
    ]
    for one in found["programs"]:
        mb = [
            f"{one[key] / 1e6:.2f}"
            for key in ("predicted_argument_bytes", "measured_argument_bytes",
                        "predicted_new_bytes", "measured_new_bytes")
        ]  # fmt: skip
        ratio = one["predicted_peak_bytes"] / one["measured_peak_bytes"]
        counted = f"{one['counted_s']:.3g} s" if one["counted_s"] else ""
        times = f"{one['roofline_s']:.3g} s | {counted} | {one['measured_s']:.3g} s"
        lines.append(
            f"| {one['program']} | {' | '.join(mb)} | {ratio:.2f} | {times} | {one['bound']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command.call(main, required=("out",)))
