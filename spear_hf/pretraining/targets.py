# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The tokens of each teacher: a store that is there, or one made at the first start and used again on resuming."""

import logging
from collections.abc import Mapping, Sequence

from ..data.collation import needing_target
from ..data.manifest import Utterance
from ..data.utterances import UtteranceList
from ..mvq.quantize import train_tokenizer
from ..mvq.quantizer_files import CONFIG_NAME
from ..mvq.store import TokenStore
from ..mvq.store_location import find_store, named_teacher
from ..mvq.teachers import load_teacher
from ..mvq.tokenize_corpus import tokenize_corpus
from ..mvq.tokenizer import MvqTokenizer
from ..mvq.training import QuantizerTrainingConfig
from .config import PreTrainingConfig, TargetConfig
from .corpus import Corpus
from .run_folder import RunFolder


logger = logging.getLogger(__name__)


def prepare_stores(
    config: PreTrainingConfig,
    targets: Mapping[str, TargetConfig],
    corpus: Corpus,
    folder: RunFolder,
    device: str = "cpu",
) -> dict[str, TokenStore]:
    """Opens, and where the configuration asks for it first makes, the token store of every target.

    `targets` are those of `config`, with their stores settled (sources.py).
    Quantisers made here are saved in OUTPUT/tokenizers and tokens in OUTPUT/tokens, both whole or not at all, so an
    interrupted start goes on where it was. A store is only checked against the data by `collation.check_tokens`.
    """
    stores: dict[str, TokenStore] = {}
    for name, target in targets.items():
        training, validation = utterances_of_target(name, target, corpus)
        if target.store is not None:
            stores[name] = _open(target.store, [corpus.store, *stores.values()])
            continue
        if target.tokenizer is None and target.teacher is None:
            raise ValueError(
                f"targets.{name} has no tokens: name a token store with --set targets.{name}.store=PATH, or a "
                f"tokenizer with --set targets.{name}.tokenizer=PATH."
            )
        folder.create(config)
        store = _existing_store(folder, name, training, validation)
        stores[name] = store or _make_store(config.seed, name, target, training, validation, folder, device)
    return stores


def utterances_of_target(name: str, target: TargetConfig, corpus: Corpus) -> tuple[UtteranceList, UtteranceList]:
    """The training and the held-out utterances that predict its tokens. ValueError if none of the former does."""
    training, validation = (
        needing_target(name, group, target.domains) for group in (corpus.training, corpus.validation)
    )
    if not training:
        raise ValueError(
            f"No training utterance is of a domain that targets.{name} is for, so it would learn nothing: give "
            f"utterances their domain (speech or audio), change targets.{name}.domains, or leave the target out "
            f"with --set targets.{name}=null."
        )
    return training, validation


def _open(source: str, opened: Sequence[TokenStore | None]) -> TokenStore:
    """The store, with the index of one of those `opened` where it is the same."""
    place, teacher = named_teacher(source)
    location = find_store(place)
    same = next((store for store in opened if store is not None and store.location == location), None)
    return TokenStore.open(source) if same is None else same.of_teacher(teacher)


def _existing_store(folder: RunFolder, name: str, *needed: UtteranceList) -> TokenStore | None:
    """The store of an earlier start, if it is complete and has these utterances."""
    try:
        store = TokenStore.open(folder.tokens / name)
    except ValueError:
        return None
    return store if all((store.rows_of_utterances(group) >= 0).all() for group in needed) else None


def _make_store(
    seed: int,
    name: str,
    target: TargetConfig,
    training: Sequence[Utterance],
    validation: Sequence[Utterance],
    folder: RunFolder,
    device: str,
) -> TokenStore:
    """Tokenises; without a tokenizer it first trains one, on the training utterances alone."""
    needed = [*training, *validation]
    source = target.tokenizer
    if source is None:
        assert target.teacher is not None
        trained = folder.tokenizers / name
        if not (trained / CONFIG_NAME).exists():  # it is written last
            logger.info("Training a quantiser on %s into %s.", target.teacher, trained)
            train_tokenizer(
                load_teacher(target.teacher, layer=target.layer, device=device),
                training,
                trained,
                QuantizerTrainingConfig(
                    num_codebooks=target.num_codebooks,
                    codebook_size=target.codebook_size,
                    normalize=target.quantizer_normalize,
                    steps=target.quantizer_steps,
                    seed=seed,
                ),
                num_frames=target.quantizer_frames,
                progress=False,
            )
        source = str(trained)
    tokenizer = MvqTokenizer.from_pretrained(source, device=device)
    logger.info("Tokenising %d utterances with %s into %s.", len(needed), tokenizer.teacher.id, folder.tokens / name)
    summary = tokenize_corpus(tokenizer, needed, folder.tokens / name, progress=False)
    if summary.bad:
        shown = "; ".join(f"{item.id}: {item.error}" for item in summary.bad[:5])
        raise ValueError(
            f"{len(summary.bad)} utterances cannot be tokenised ({shown}). Take them out of the manifest and start "
            "again in a new folder."
        )
    return TokenStore.open(folder.tokens / name)
