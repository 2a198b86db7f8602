# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Entry of torch.hub and of s3prl's hub: every public callable here is one of its names. See superb.py."""

from typing import Any

from spear_hf.evaluation.superb import UpstreamExpert as _UpstreamExpert


def spear(ckpt: str | None = None, *args: Any, **kwargs: Any) -> _UpstreamExpert:
    """The SPEAR model `ckpt`, a folder or Hub id, as an upstream of s3prl."""
    return _UpstreamExpert(ckpt, *args, **kwargs)


__all__ = ["spear"]
