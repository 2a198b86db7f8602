# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of others to ours and back: the logic behind `spear-hf convert` and the scripts in `conversion/`."""
