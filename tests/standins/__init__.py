"""Small remote-code checkpoints in the shapes of NorBERT3 and of both revisions of NorBERT4, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import normalizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from tests.checkpoints import DOCUMENTS, QUERIES, SIZE, byte_level_tokenizer
from trainer.models.norbert import FAMILIES, convert_files
from trainer.models.norbert_faults import Change
from trainer.models.scratch import train_tokenizer

FOLDER = Path(__file__).parent
SHAPES = ("norbert3", "norbert4", "norbert4-newer")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = {"norbert3": "Norbert", "norbert4": "GptBert"}

# Where the newer revision of NorBERT4's code differs from the older: it takes is_decoder from the model, not the config.
NEWER = {
    "self, config: GptBertConfig, layer_idx: int)": "self, config: GptBertConfig, layer_idx: int, is_decoder: bool)",
    "self.is_causal = config.is_decoder": "self.is_causal = is_decoder",
    "SelfAttention(config, layer_idx)": "SelfAttention(config, layer_idx, is_decoder)",
    "Layer(config, i) for": "Layer(config, i, is_decoder) for",
    "self.encoder = Encoder(config)": 'self.encoder = Encoder(config, getattr(self, "is_decoder", False))',
    "        config.is_decoder = True\n": "        self.is_decoder = True\n",
    "max_sequence_length": "max_position_embeddings",
}


def code_of(shape: str) -> dict[str, str]:
    """The Python files as they are published, by name."""
    texts = {file.name: file.read_text() for file in sorted((FOLDER / shape.partition("-")[0]).glob("*.py"))}
    if shape == "norbert4-newer":
        encoder = "class Encoder(nn.Module):\n"
        name = "modeling_gptbert.py"
        head, tail = texts[name].split(encoder)
        tail = tail.replace("self, config: GptBertConfig)", "self, config: GptBertConfig, is_decoder: bool)", 1)
        texts[name] = head + encoder + tail
        for old, new in NEWER.items():
            assert any(old in text for text in texts.values()), old
            texts = {name: text.replace(old, new) for name, text in texts.items()}
    return texts


def changes_of(shape: str) -> tuple[Change, ...]:
    """What the conversion changes in this family."""
    return next(changes for name, changes in FAMILIES.items() if name in code_of(shape))


def write_norbert(folder: Path, shape: str, bias: float = -6.0) -> Path:
    """A masked language model as its authors would publish it."""
    converted = _write_converted(folder / "converted", shape, bias)
    return _with_published_code(converted, folder / "published", shape)


def write_dense_norbert(folder: Path, shape: str) -> Path:
    """A dense sentence encoder on top of it."""
    converted = _write_converted(folder / "converted", shape, 0.0)
    trust = {"trust_remote_code": True}
    transformer = Transformer(
        str(converted), max_seq_length=32, model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust
    )
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu", trust_remote_code=True)
    model.save_pretrained(str(folder / "dense"))
    return _with_published_code(folder / "dense", folder / "published", shape)


def _write_converted(folder: Path, shape: str, bias: float) -> Path:
    """The published code can neither be loaded nor saved by transformers 5, so the weights are made with the converted."""
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    family = shape.partition("-")[0]
    tokenizer = _tokenizer(family)
    for name, text in convert_files(code_of(shape), folder).items():
        (folder / name).write_text(text)
    modeling = next(name for name in code_of(shape) if name.startswith("modeling")).removesuffix(".py")
    prefix = PREFIX[family]
    settings = {
        "architectures": [f"{prefix}ForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{modeling.replace('modeling', 'configuration')}.{prefix}Config",
            "AutoModel": f"{modeling}.{prefix}Model",
            "AutoModelForMaskedLM": f"{modeling}.{prefix}ForMaskedLM",
        },
        "tie_word_embeddings": family == "norbert3",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """NorBERT4: byte-level, with only `<s>` added, in front. NorBERT3: [CLS] and [SEP] around a text."""
    if family == "norbert3":
        return train_tokenizer(SIZE, QUERIES + DOCUMENTS)
    special = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    tokenizer = byte_level_tokenizer(special, first="<s>", last="</s>")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _with_published_code(source: Path, folder: Path, shape: str) -> Path:
    """NorBERT3's weights are a torch file, in which the decoder and the embeddings are one tensor under two names."""
    source.rename(folder)
    if shape == "norbert3":
        weights = load_file(folder / "model.safetensors")
        if "classifier.nonlinearity.5.bias" in weights:
            weights["classifier.nonlinearity.5.weight"] = weights["embedding.word_embedding.weight"]
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for name, text in code_of(shape).items():
        (folder / name).write_text(text)
    settings = json.loads((folder / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
