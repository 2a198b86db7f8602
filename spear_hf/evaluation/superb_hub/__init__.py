# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A folder for `torch.hub.load(..., source="local")`: see superb.py."""
