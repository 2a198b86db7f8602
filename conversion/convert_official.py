# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Published SPEAR checkpoints and icefall's to ours, and ours to the published format; `spear-hf convert` is the same.

python conversion/convert_official.py marcoyang/spear-base-speech-audio-v2 spear-base
python conversion/convert_official.py spear-base spear-base-published --to published
python conversion/convert_official.py epoch-50.pt spear-pretrained --head codebook_loss_heads.0=speech
"""

import typer

from spear_hf.cli import convert


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)

if __name__ == "__main__":
    app()
