# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The tokens of each teacher: a store that is there, or one made at the first start and used again on resuming."""

import logging
from collections.abc import Sequence

from ..data.collation import needs_target
from ..data.manifest import Utterance
from ..mvq.store import TokenStore
from ..mvq.tokenize_corpus import tokenize_corpus
from ..mvq.tokenizer import MvqTokenizer
from .config import PreTrainingConfig, TargetConfig
from .run_folder import RunFolder


logger = logging.getLogger(__name__)


def prepare_stores(
    config: PreTrainingConfig, utterances: Sequence[Utterance], folder: RunFolder, device: str = "cpu"
) -> dict[str, TokenStore]:
    """Opens, and where the configuration asks for it first makes, the token store of every target.

    Quantisers made here are saved in OUTPUT/tokenizers and tokens in OUTPUT/tokens, both whole or not at all, so an
    interrupted start goes on where it was. A store is only checked against the data by `collation.check_tokens`.
    """
    stores = {}
    for name, target in config.targets.items():
        if target.store is not None:
            stores[name] = TokenStore.open(target.store)
            continue
        if target.tokenizer is None and target.teacher is None:
            raise ValueError(
                f"targets.{name} has no tokens: name a token store with --set targets.{name}.store=PATH, or a tokenizer "
                f"with --set targets.{name}.tokenizer=PATH."
            )
        needed = [utterance for utterance in utterances if needs_target(name, utterance.domain)]
        if not needed:
            raise ValueError(f"No utterance has the domain that targets.{name} is for, so it would learn nothing.")
        stores[name] = _existing_store(folder, name, needed) or _make_store(
            config.seed, name, target, needed, folder, device
        )
    return stores


def _existing_store(folder: RunFolder, name: str, needed: Sequence[Utterance]) -> TokenStore | None:
    """The store of an earlier start, if it is complete and has these utterances."""
    try:
        store = TokenStore.open(folder.tokens / name)
    except ValueError:
        return None
    return store if all(utterance.id in store for utterance in needed) else None


def _make_store(
    seed: int, name: str, target: TargetConfig, needed: Sequence[Utterance], folder: RunFolder, device: str
) -> TokenStore:
    if target.tokenizer is not None:
        tokenizer = MvqTokenizer.from_pretrained(target.tokenizer, device=device)
    else:
        tokenizer = _trained_tokenizer(seed, name, target, needed, folder, device)
    logger.info("Tokenising %d utterances with %s into %s.", len(needed), tokenizer.teacher.id, folder.tokens / name)
    summary = tokenize_corpus(tokenizer, needed, folder.tokens / name)
    if summary.bad:
        shown = "; ".join(f"{item.id}: {item.error}" for item in summary.bad[:5])
        raise ValueError(
            f"{len(summary.bad)} utterances cannot be tokenised ({shown}). Take them out of the manifest and start again "
            "in a new folder."
        )
    return TokenStore.open(folder.tokens / name)
