"""What is evaluated: a run of this project, a local model, or one on the hub."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from sentence_transformers import SparseEncoder
from sentence_transformers.util import load_file_path

from evaluate.trust import require_pinned_code
from trainer.config import Config, ConfigError, find_config, is_commit, is_local, is_revision, load_config, one_line
from trainer.encoding.fuse import fuse
from trainer.encoding.windows import read_in_windows
from trainer.models.weights import whole_weights
from trainer.runs.results import EvalFolder, system_of
from trainer.runs.run import MODELS, hash_of_model
from trainer.system.files import read_json


@dataclass(frozen=True)
class Subject:
    """A model, and the run it came from where there is one."""

    name: str
    model: str
    revision: str | None
    trust_remote_code: bool
    folder: Path
    config: Config | None = None
    manifest: dict[str, Any] | None = None
    long_documents: str = "cut"
    """As model.long_documents of a config."""

    @property
    def results(self) -> EvalFolder:
        """Where scores go."""
        return EvalFolder(self.folder / "eval", self.manifest)

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.folder / "report"

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the model does, or when it reads long documents in another way."""
        return system_of(fingerprint_of(self.model, self.revision), self.long_documents)

    def load(self) -> SparseEncoder:
        """The encoder. Raises ConfigError when it cannot be loaded or is not sparse."""
        if self.trust_remote_code:
            require_pinned_code("--model", self.model, self.revision)
        try:
            self._require_sparse()
            with whole_weights("model", self.model):
                model = SparseEncoder(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{self.model} cannot be loaded: {one_line(error)}") from None
        fuse(model)
        if self.long_documents == "windows":
            read_in_windows(model)
        model.model_card_data.model_name = self.name  # mteb's name for it: unnamed models would share results
        return model

    def _require_sparse(self) -> None:
        """Raise ConfigError for a saved model of another kind: the library would put untrained layers on top of it."""
        settings = load_file_path(self.model, "config_sentence_transformers.json", revision=self.revision)
        if settings is None and Path(self.model).is_dir():
            raise ConfigError(f"{self.model} is no saved sparse encoder: there is no config_sentence_transformers.json")
        kind = read_json(Path(settings)).get("model_type", "SentenceTransformer") if settings else "SparseEncoder"
        if kind != "SparseEncoder":
            raise ConfigError(f"{self.model} is not a sparse encoder but a {kind}. To compare with it: --dense")


def fingerprint_of(model: str, revision: str | None) -> str:
    """A hash of a local model's files, or a hub model's commit. Raises ConfigError when the hub does not answer."""
    if Path(model).is_dir():
        return hash_of_model(Path(model))
    known = try_to_load_from_cache(model, "modules.json", revision=revision)
    if isinstance(known, str):
        return f"{model}@{Path(known).parent.name}"
    try:
        return f"{model}@{HfApi().model_info(model, revision=revision, timeout=10).sha}"
    except Exception as error:  # whatever the hub and its transport raise
        raise ConfigError(f"{model} cannot be loaded: {one_line(error)}") from None


def open_subject(
    config: str | None,
    model: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    long_documents: str | None = None,
) -> Subject:
    """The run of a config, or a model by path or hub name. Raises ConfigError when there is nothing to evaluate.

    long_documents: by default as the run's config says, and cut for a model that is no run.
    """
    subject = _find_subject(config, model, revision, trust_remote_code)
    return replace(subject, long_documents=long_documents) if long_documents else subject


def _find_subject(config: str | None, model: str | None, revision: str | None, trust_remote_code: bool) -> Subject:
    if (config is None) == (model is None):
        raise ConfigError("say what to evaluate: a config's name, or --model with a path or a hub name; not both")
    if config is not None:
        folder = MODELS / load_config(find_config(config)).name
        if not (folder / "final").is_dir():
            raise ConfigError(f"{folder} holds no trained model. Train it first: make train CONFIG={config}")
        return _run(folder)
    assert model is not None
    if not is_local(model):
        if model.startswith("models/"):
            raise ConfigError(f"there is no model at {model}")
        if revision is not None and not is_revision(revision):
            raise ConfigError(f"--revision must be a commit, tag or branch, not {revision!r}")
        if trust_remote_code and not is_commit(revision):
            raise ConfigError("--trust-remote-code runs the model's own code, so --revision must be a full commit")
        return Subject(model.partition("/")[2], model, revision, trust_remote_code, MODELS / model.replace("/", "__"))
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"there is no model at {model}")
    if (path / "run.json").is_file():
        return _run(path)
    if path.name == "final" and (path.parent / "run.json").is_file():
        return _run(path.parent)
    return Subject(path.name, str(path), None, trust_remote_code, path)


def _run(folder: Path) -> Subject:
    config, manifest = load_config(folder / "config.yaml").config, read_json(folder / "run.json")
    name, model, trusted = folder.resolve().name, str(folder / "final"), config.model.trust_remote_code
    return Subject(name, model, None, trusted, folder, config, manifest, config.model.long_documents)
