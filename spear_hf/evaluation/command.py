# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf evaluate` does."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_evaluation(
    models: Sequence[str],
    tasks: Sequence[str],
    output: Path,
    card: Path | None = None,
    default_baselines: bool = True,
    baselines: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "float32",
    cache: Path | None = None,
    batch_seconds: float = 30.0,
    max_seconds: float = 120.0,
    **settings: Any,
) -> int:
    """Exit code 0, or 1 on an error, which is printed."""
    from .benchmark import DEFAULT_BASELINES, evaluate
    from .protocols import Settings
    from .report import add_to_card, markdown, read_card, write_report

    try:
        if card is not None and (len(models) != 1 or not card.is_file()):
            raise ValueError(
                f"--card {card} must be the README.md of the only --model; a model without one gets it from `spear-hf "
                "publish`, with the results, if OUTPUT/report.json is copied to evaluation.json in its folder"
            )
        if card is not None:
            read_card(card)  # before hours of work
        report = evaluate(
            models,
            tasks,
            output,
            baselines=[*(DEFAULT_BASELINES if default_baselines else ()), *baselines],
            cache=cache,
            settings=Settings(**settings),
            device=device,
            dtype=dtype,
            batch_seconds=batch_seconds,
            max_seconds=max_seconds,
        )
        path = write_report(report, output)
        if card is not None:
            add_to_card(card, report)
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf evaluate: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    print(f"Written: {path}, {path.with_suffix('.json')}")
    return 0
