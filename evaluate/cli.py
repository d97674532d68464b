"""python -m evaluate: bm25."""

from pathlib import Path

import click

from trainer.beir import has_split, is_beir, read_search_set
from trainer.config import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure baselines on search tasks."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--split", default="dev", show_default=True, help="Split of the queries.")
@click.option("--language", type=click.Choice(["no", "nb", "nn", "da", "sv"]), help="Stem words of this language.")
def bm25(folder: Path, split: str, language: str | None) -> None:
    """nDCG@10 of BM25 on FOLDER, a search set in BEIR layout."""
    if not is_beir(folder) or not has_split(folder, split):
        raise ConfigError(
            f"{folder} is not a folder in BEIR layout with a split '{split}' (corpus.jsonl, qrels.{split}.tsv)"
        )
    from evaluate.bm25 import mean_ndcg, search

    found = read_search_set(folder, split, folder.name)
    score = mean_ndcg(search(found, language), found.relevant)
    how = f"stemmed ({language})" if language else "unstemmed"
    click.echo(
        f"BM25 {how} on {folder.name}: nDCG@10 {score:.4f}, {len(found.queries)} queries, {len(found.corpus)} passages"
    )
