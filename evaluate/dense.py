"""A dense model beside the sparse one: `--dense org/model@revision`, or a folder."""

from pathlib import Path

import mteb
from mteb.models import SearchEncoderWrapper, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from evaluate.trust import registry_entry, require_pinned_code, require_trust
from trainer.config import ConfigError, is_commit, is_revision, one_line
from trainer.models.prompts import NAMES, by_side
from trainer.models.weights import whole_weights


def split_dense(source: str) -> tuple[str, str | None]:
    """Name and revision of `org/model@revision`; a local folder has none. Raises ConfigError for what cannot be one."""
    if Path(source).exists():
        return source, None
    name, _, revision = source.partition("@")
    if revision and not is_revision(revision):
        raise ConfigError(f"--dense {source}: a revision is a commit, tag or branch")
    return name, revision or None


def dense_name(source: str) -> str:
    """A dense model's name among the systems."""
    name, _ = split_dense(source)
    return Path(name).resolve().name if Path(name).exists() else name.replace("/", "__")


def load_dense(source: str, trust_remote_code: bool) -> SearchEncoderWrapper:
    """A dense model as mteb searches with it, with the prompts of mteb's registry (e5 needs them) or else its own.

    Its own code runs only with --trust-remote-code and, from the hub, for a pinned commit: `org/model@commit`.
    """
    name, revision = split_dense(source)
    require_trust(name, revision, trust_remote_code)
    trust = trust_remote_code and (Path(name).exists() or is_commit(revision))
    if trust:
        require_pinned_code("--dense", name, revision)
    try:
        with whole_weights("--dense", source):
            if registry_entry(name):
                return SearchEncoderWrapper(mteb.get_model(name, **({"revision": revision} if revision else {})))
            model = SentenceTransformer(name, revision=revision, trust_remote_code=trust)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, mteb's loaders or the model's own code raise
        way_out = ""
        if not trust and "trust_remote_code" in str(error):
            commit = "" if Path(name).exists() else "@<commit>"
            way_out = f". It has code of its own. Read it; to run it: --dense {name}{commit} --trust-remote-code"
        raise ConfigError(f"--dense {source} cannot be loaded: {one_line(error)}{way_out}") from None
    # under the names that mteb knows: of a "passage" it would say that it is ignored
    others = {name: text for name, text in model.prompts.items() if name not in NAMES["document"]}
    model.prompts = others | by_side(model.prompts)
    model.model_card_data.model_name = dense_name(source)
    return SearchEncoderWrapper(SentenceTransformerEncoderWrapper(model))
