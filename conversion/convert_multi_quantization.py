# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A quantiser of the `multi_quantization` package to ours.

python conversion/convert_multi_quantization.py quantizer.pt wavlm-large-l21 --teacher microsoft/wavlm-large --layer 21
"""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert_multi_quantization(
    source: Annotated[
        Path, typer.Argument(help="State dict of a Quantizer, or that with mean and std; .pt, .safetensors.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    teacher: Annotated[str | None, typer.Option(help="Of the features: a Hub id, kaldi-mfcc, module:factory.")] = None,
    layer: Annotated[int | None, typer.Option(help="The teacher's hidden layer.")] = None,
    teacher_revision: Annotated[str | None, typer.Option(help="Commit of the teacher's weights.")] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames of features a second.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier conversion.")] = False,
) -> None:
    """Convert a quantiser; nothing is written unless every tensor is accounted for and the codes agree."""
    from spear_hf.conversion.command import run_conversion
    from spear_hf.conversion.quantizer import convert_quantizer

    settings = {"teacher": teacher, "teacher_layer": layer, "teacher_revision": teacher_revision}
    raise typer.Exit(run_conversion(convert_quantizer, source, output, frame_rate=frame_rate, force=force, **settings))


if __name__ == "__main__":
    app()
