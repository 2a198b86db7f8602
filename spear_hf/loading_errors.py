# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is said where a checkpoint cannot be loaded: which it is, what is wrong with it, and what helps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import constants
from safetensors import SafetensorError


@contextmanager
def loading(model: str | os.PathLike, what: str = "model") -> Iterator[None]:
    """Around `from_pretrained` of a folder or Hub id.

    Raises:
        OSError: in place of what transformers, huggingface_hub, safetensors and torch raise for one that is not there,
            is damaged, or is a pickle of more than tensors, which is never unpickled.
        ValueError: in place of RuntimeError, for weights that are not of the sizes in config.json.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{model} is cut off or damaged ({error}): download or save it again") from error
    except UnpicklingError as error:
        raise OSError(
            f"{model} holds a pickle of more than tensors, which can run any code, and is not loaded: use a copy in "
            "safetensors"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"the weights of {model} do not fit its config.json: {_line(error)}") from error
    except OSError as error:
        if Path(model).exists():
            raise OSError(f"{model} is not complete: {_line(error)}") from error
        reason = (
            "HF_HUB_OFFLINE is set, and it was not downloaded before" if constants.HF_HUB_OFFLINE else _line(error)
        )
        raise OSError(f"there is no {what} {model} here, and the Hub gives none: {reason}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
