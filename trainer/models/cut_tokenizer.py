"""Cuts a fast tokenizer to some of its pieces: the pieces that it cannot do without, and the tokenizer with new ids.

A tokenizer is here what its tokenizer.json holds.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

# Marks of the start of a word in a piece: sentencepiece's, and byte-level BPE's byte of a blank.
WORD_STARTS = ("▁", "Ġ")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Post-processors that hold a token and its id for each end of a text.
WITH_TWO_ENDS = ("BertProcessing", "RobertaProcessing")
ENDS = ("cls", "sep")


class CannotBeCut(Exception):
    """Why a tokenizer or a model keeps its vocabulary."""


def pieces_of(tokenizer: dict[str, Any]) -> list[tuple[str, int]]:
    """Every piece and added token with its id, in the order of the ids."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        pieces = set(vocabulary.items())
    else:
        pieces = {(piece, number) for number, (piece, _) in enumerate(vocabulary)}
    pieces |= {(token["content"], token["id"]) for token in tokenizer["added_tokens"]}
    return sorted(pieces, key=lambda piece: piece[1])


def unknown_piece(tokenizer: dict[str, Any]) -> str | None:
    """The piece that stands for what the tokenizer cannot spell."""
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def needed_pieces(tokenizer: dict[str, Any], used: set[str]) -> set[str]:
    """The used pieces, and those without which the tokenizer would spell a text differently, or not at all.

    Texts that consist of used pieces are split as before. All others are spelled with shorter pieces, at worst with single
    characters. Raises CannotBeCut.
    """
    kind = tokenizer["model"]["type"]
    if kind not in NEEDED_BY_MODEL:
        raise CannotBeCut(f"its tokenizer is of the kind {kind}. Unigram, BPE and WordPiece can be cut")
    pieces, padding = pieces_of(tokenizer), tokenizer["padding"]
    needed = used | {token["content"] for token in tokenizer["added_tokens"]} | {unknown_piece(tokenizer) or ""}
    if tokenizer["post_processor"]:
        needed.update(_named_by(tokenizer["post_processor"]))
    for piece, number in pieces:
        if BYTE.fullmatch(piece) or _is_single(piece, tokenizer["model"]) or (padding and number == padding["pad_id"]):
            needed.add(piece)
    return needed | NEEDED_BY_MODEL[kind](tokenizer["model"], needed)


def cut_tokenizer(tokenizer: dict[str, Any], kept: set[str]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with these pieces alone, and their old ids by new id. Raises CannotBeCut.

    Their order stays. Every place that holds ids gets the new ones.
    """
    pieces = [(piece, number) for piece, number in pieces_of(tokenizer) if piece in kept]
    new_ids = {old: new for new, (_, old) in enumerate(pieces)}
    model = dict(tokenizer["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
        model["unk_id"] = new_ids.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if piece in kept}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if _merged(pair, model) in kept and kept.issuperset(pair)]
    processor, padding = tokenizer["post_processor"], tokenizer["padding"]
    cut = tokenizer | {
        "model": model,
        "added_tokens": [token | {"id": new_ids[token["id"]]} for token in tokenizer["added_tokens"]],
        "post_processor": processor and _renumbered(processor, new_ids),
        "padding": padding and padding | {"pad_id": new_ids.get(padding["pad_id"], padding["pad_id"])},
    }
    made = Tokenizer.from_str(json.dumps(cut))
    if [made.token_to_id(piece) for piece, _ in pieces] != list(range(len(pieces))):
        raise CannotBeCut("its tokenizer numbers its tokens in an order of its own")
    return made, [old for _, old in pieces]


# ------------------------------------------------------------------------------------------- what each kind needs
def _is_single(piece: str, model: dict[str, Any]) -> bool:
    """Whether a piece is one character, wherever it stands in a word."""
    for mark in (*WORD_STARTS, model.get("continuing_subword_prefix")):
        if mark and piece != mark:
            piece = piece.removeprefix(mark)
    return len(piece.removesuffix(model.get("end_of_word_suffix") or "")) <= 1


def _needed_by_unigram(model: dict[str, Any], needed: set[str]) -> set[str]:
    """Pieces with a character that has no piece of its own, and the least likely piece.

    What an unknown character costs follows from the least likely piece: without it, texts with one might be split
    differently.
    """
    pieces = {piece for piece, _ in model["vocab"]}
    lowest = min(model["vocab"], key=lambda entry: entry[1])[0]
    if model.get("byte_fallback"):
        return {lowest}

    def is_spelled(piece: str) -> bool:
        start = 2 if piece.startswith(WORD_STARTS) and piece[:2] in pieces else 0
        return pieces.issuperset(piece[start:])

    return {piece for piece in pieces if not is_spelled(piece)} | {lowest}


def _needed_by_wordpiece(model: dict[str, Any], needed: set[str]) -> set[str]:
    """Pieces with a character that has no piece of its own at that place: at the start of a word, or further on."""
    pieces, prefix = model["vocab"].keys(), model["continuing_subword_prefix"]

    def is_spelled(piece: str) -> bool:
        is_start = not piece.startswith(prefix)
        letters = piece.removeprefix(prefix)
        return all((letter if is_start and not at else prefix + letter) in pieces for at, letter in enumerate(letters))

    return {piece for piece in pieces if not is_spelled(piece)}


def _needed_by_bpe(model: dict[str, Any], needed: set[str]) -> set[str]:
    """The parts that needed pieces are merged from, and the parts of those."""
    made_from: dict[str, list[str]] = defaultdict(list)
    for pair in model["merges"]:
        made_from[_merged(pair, model)] += pair
    parts, left = set(needed), list(needed)
    while left:
        new = set(made_from[left.pop()]) - parts
        parts |= new
        left += new
    return parts


def _merged(pair: list[str], model: dict[str, Any]) -> str:
    """The piece that a merge makes."""
    return pair[0] + pair[1][len(model.get("continuing_subword_prefix") or "") :]


NEEDED_BY_MODEL: dict[str, Callable[[dict[str, Any], set[str]], set[str]]] = {
    "Unigram": _needed_by_unigram,
    "WordPiece": _needed_by_wordpiece,
    "BPE": _needed_by_bpe,
}


# ------------------------------------------------------------------------------------------- what is put around a text
def _named_by(processor: dict[str, Any]) -> list[str]:
    """The tokens that a post-processor puts around a text. Raises CannotBeCut for one of an unknown kind."""
    kind = processor["type"]
    if kind == "Sequence":
        return [token for each in processor["processors"] for token in _named_by(each)]
    if kind == "TemplateProcessing":
        return [token for special in processor["special_tokens"].values() for token in special["tokens"]]
    if kind in WITH_TWO_ENDS:
        return [processor[end][0] for end in ENDS]
    if kind == "ByteLevel":
        return []
    raise CannotBeCut(f"what its tokenizer puts around a text is of an unknown kind, {kind}")


def _renumbered(processor: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """A post-processor with new ids."""
    kind = processor["type"]
    if kind == "Sequence":
        return processor | {"processors": [_renumbered(each, new_ids) for each in processor["processors"]]}
    if kind == "TemplateProcessing":
        tokens = {
            name: special | {"ids": [new_ids[old] for old in special["ids"]]}
            for name, special in processor["special_tokens"].items()
        }
        return processor | {"special_tokens": tokens}
    if kind in WITH_TWO_ENDS:
        return processor | {end: [processor[end][0], new_ids[processor[end][1]]] for end in ENDS}
    return processor
