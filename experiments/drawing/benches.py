"""Figures of benches that are in the documentation."""

from collections.abc import Mapping, Sequence

from luspo_jax.hosts import figure_style


def head_memory(found: Mapping):
    """Draws temporary memory of the head over tokens, as `experiments.bench.head_memory` found."""
    plt = figure_style.pyplot()
    rows = found["rows"]
    figure, axes = plt.subplots(figsize=(6.2, 4), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    names = [name for name in rows[0] if name != "tokens"]
    chunks = sorted((name for name in names if name != "plain"), key=int)
    for index, name in enumerate([*chunks, "plain"]):
        label = "all logits at once" if name == "plain" else f"chunks of {int(name):,} tokens"
        line = {"color": figure_style.LINES[index], "ls": "--" if name == "plain" else "-"}
        marker = figure_style.MARKERS[index]
        values = [row[name] / 2**30 for row in rows]
        axes.plot(tokens, values, marker=marker, label=label, **line)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="temporary memory, GiB")
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.minorticks_off()
    axes.set_title(f"Head and log-probs, V = {found['vocab']:,}, D = {found['embed']:,}")
    figure_style.label_ends(axes)
    return figure


def long_context(rows: Sequence[Mapping]):
    """Draws cost and memory of long rows, as `experiments.bench.long_context` measured."""
    plt = figure_style.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["microseconds_a_token"] for row in rows], marker="o")
    left.set(xscale="log", ylim=(0, None), xlabel="tokens a row", ylabel="µs a token")
    left.set_title("Cost of a token, one training step")
    needed = [row["temporary_bytes_a_device"] / 2**20 for row in rows]
    right.plot(tokens, needed, marker="o", label="a step")
    square = {"color": figure_style.SOFT_INK, "ls": figure_style.DASHES[1]}
    right.plot(tokens, [4 * n * n / 2**20 for n in tokens], label="one T × T", **square)
    right.set(xscale="log", yscale="log", xlabel="tokens a row", ylabel="MiB a device")
    right.set_title(f"Temporary memory, {rows[0]['devices']} devices")
    for axes in (left, right):
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.minorticks_off()
    figure_style.label_ends(right)
    return figure
