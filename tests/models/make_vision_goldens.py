"""Writes `vision_goldens/`: tiny random Qwen2.5-VL checkpoints with what `transformers` makes of
images: the tower's embeddings, positions, logits and greedy tokens.

Needs torch: `python tests/models/make_vision_goldens.py`. The live parity tests build other sizes
and seeds through `reference_model`.
"""

import copy
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parent / "vision_goldens"
GREEDY_TOKENS = 32
TIE = 2e-3  # a closer call than this between two tokens says nothing about either port

TOKENS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
TEXT = {
    "vocab_size": 68,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
}
# As the 7B, and as the 3B, whose head is tied, with other proportions of the tower.
VARIANTS = {
    "untied": {"mrope_section": [2, 3, 3]},
    "tied": {
        "mrope_section": [1, 2, 1],
        "theta": 1e6,
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vision": {"depth": 2, "num_heads": 4, "window_size": 12, "fullatt_block_indexes": [0]},
    },
}

# Rows of a batch; a number is a run of text, a pair the rows and columns of an image's patches.
CASES = {
    "one_image": [[3, (4, 6), 4]],
    "two_images": [[2, (8, 4), 3, (2, 10), 2]],
    "odd_aspect": [[1, (2, 18), 3]],
    "middle_of_chat": [[9, (6, 6), 12, (4, 4), 7]],
    "text_only": [[11]],
    "mixed_batch": [[5], [2, (4, 10), 3], [1, (2, 2), 2, (12, 4), 6], [8, (4, 4)]],
}


def reference_model(variant: str, *, seed: int, vision=(), **sizes):
    """A `transformers` model of a variant in float32, every weight drawn at random."""
    fields = TOKENS | TEXT | VARIANTS[variant] | sizes
    tower = VISION | fields.pop("vision", {}) | dict(vision)
    tower["out_hidden_size"] = fields["hidden_size"]
    sections, theta = fields.pop("mrope_section"), fields.pop("theta", 10_000.0)
    fields["rope_scaling"] = {"type": "mrope", "mrope_section": sections}
    config = transformers.Qwen2_5_VLConfig(
        **fields, rope_theta=theta, vision_config=tower, dtype="float32"
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
    return model


def rows_of(case, config, *, seed: int):
    """(tokens [T], patches of its images [P, C] each, grids) of every row of a case."""
    rng = np.random.default_rng(seed)
    channels = 3 * 2 * config.vision_config.patch_size**2
    rows = []
    for parts in case:
        tokens, patches, grids = [], [], []
        for part in parts:
            if isinstance(part, int):
                tokens += rng.integers(3, 60, part).tolist()
                continue
            tokens += [config.vision_start_token_id]
            tokens += [config.image_token_id] * (part[0] * part[1] // 4)
            tokens += [config.vision_end_token_id]
            patches.append(rng.normal(size=(part[0] * part[1], channels)).astype(np.float32))
            grids.append((1, *part))
        rows.append((np.array(tokens, np.int32), patches, grids))
    return rows


def inputs_of(rows, config):
    """Arguments of the model for rows padded on the right."""
    longest = max(len(tokens) for tokens, _, _ in rows)
    tokens_BT = np.zeros((len(rows), longest), np.int64)
    mask_BT = np.zeros_like(tokens_BT)
    for row, (tokens, _, _) in enumerate(rows):
        tokens_BT[row, : len(tokens)], mask_BT[row, : len(tokens)] = tokens, 1
    inputs = {"input_ids": torch.tensor(tokens_BT), "attention_mask": torch.tensor(mask_BT)}
    grids = [grid for _, _, grids in rows for grid in grids]
    if grids:
        patches = np.concatenate([x for _, patches, _ in rows for x in patches])
        inputs |= {
            "pixel_values": torch.tensor(patches),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": torch.tensor((tokens_BT == config.image_token_id).astype(int)),
        }
    return inputs


@torch.no_grad()
def reference_units(model, rows) -> np.ndarray:
    """Embeddings [U, D] of all units of all images, in raster order, one image after another."""
    inputs = inputs_of(rows, model.config)
    if "pixel_values" not in inputs:
        return np.zeros((0, model.config.text_config.hidden_size), np.float32)
    made = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return made.pooler_output.numpy()


def reference_positions(model, rows) -> tuple[np.ndarray, np.ndarray]:
    """(positions [B, T, 3], position that comes after each row [B]); zero on padding."""
    inputs = inputs_of(rows, model.config)
    mask_BT = inputs["attention_mask"]
    if "image_grid_thw" not in inputs:
        positions_BT = ((mask_BT.cumsum(1) - 1) * mask_BT).numpy()
        return np.repeat(positions_BT[..., None], 3, axis=2), mask_BT.sum(1).numpy()
    positions, deltas = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=mask_BT,
    )
    after = (mask_BT.sum(1) + deltas[:, 0]).numpy()
    return np.moveaxis(positions.numpy(), 0, -1), after


@torch.no_grad()
def reference_logits(model, rows) -> np.ndarray:
    """Logits [B, T, V], zero on padding."""
    inputs = inputs_of(rows, model.config)
    logits = model(**inputs).logits * inputs["attention_mask"][..., None]
    return logits.numpy().astype(np.float32)


@torch.no_grad()
def reference_greedy(model, rows, count: int):
    """Greedy continuations [B, count] by `generate`, and the closest call between two tokens."""
    model = copy.deepcopy(model)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    found, closest = [], np.inf
    for row in rows:
        made = model.generate(
            **inputs_of([row], model.config),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(made.sequences[0, len(row[0]) :].numpy())
        top = torch.stack(made.logits).topk(2).values
        closest = min(closest, (top[..., 0] - top[..., 1]).min().item())
    return np.stack(found).astype(np.int32), closest


def main() -> None:
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for variant in VARIANTS:
        for seed in range(100):
            model = reference_model(variant, seed=seed)
            rows = rows_of(CASES["mixed_batch"], model.config, seed=seed)
            greedy, closest = reference_greedy(model, rows, GREEDY_TOKENS)
            if closest > TIE:
                break
        model.save_pretrained(GOLDENS / variant)
        (GOLDENS / variant / "generation_config.json").unlink(missing_ok=True)
        positions, after = reference_positions(model, rows)
        np.savez_compressed(
            GOLDENS / variant / "expected.npz",
            units=reference_units(model, rows),
            positions=positions.astype(np.int32),
            after=after.astype(np.int32),
            logits=reference_logits(model, rows),
            greedy=greedy,
            **{f"tokens_{i}": tokens for i, (tokens, _, _) in enumerate(rows)},
            **{f"grids_{i}": np.array(grids) for i, (_, _, grids) in enumerate(rows)},
            **{
                f"patches_{i}_{j}": x
                for i, (_, patches, _) in enumerate(rows)
                for j, x in enumerate(patches)
            },
        )
        print(
            f"{variant}: seed {seed}, closest call {closest:.1e}, {len(np.unique(greedy))} tokens"
        )
    (GOLDENS / "versions.json").write_text(
        json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n"
    )


if __name__ == "__main__":
    main()
