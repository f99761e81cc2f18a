"""A tokenizer that marks images as Qwen does, images in files, and renderers of both."""

import pytest

from luspo_jax.datasets.images import ImageFiles
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import ImageSettings
from luspo_jax.prompts import Renderer
from tests.prompts.prompt_cases import VISION


@pytest.fixture(scope="module")
def small_tokenizer():
    import tokenizers
    import transformers

    words = ["<|unknown|>", *VISION, *(chr(c) for c in range(32, 127)), "\n"]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("[\\s\\S]"), "isolated"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|unknown|>", additional_special_tokens=VISION
    )


@pytest.fixture(scope="module")
def preparer():
    with ImagePreparer(ImageSettings(), workers=2) as ready:
        yield ready


@pytest.fixture
def renderer(small_tokenizer, preparer, picture_folder):
    source = picture_folder / "data.jsonl"
    return Renderer(small_tokenizer, images=preparer, image_files=ImageFiles(source))


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Files of 4 (56 × 56) and 6 (56 × 84) tokens, a damaged one, and one of 1,024."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("pictures")
    for name, size in {"four": (56, 56), "six": (84, 56), "large": (896, 896)}.items():
        PIL.Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes((folder / "four.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def qwen_vl(shared_data):
    import transformers

    folder = shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct"
    return transformers.AutoTokenizer.from_pretrained(folder)
