# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Multi-codebook vector quantiser (MVQ): a frame of features becomes one code of each codebook, and back.

Codebooks are independent, not residual: the decoded frame is the sum of one centre of each. A linear classifier
guesses the codes, a search (refinement.py) improves them. Parameters and results are those of the
`multi_quantization` package.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_hf.mvq.cuda_encoder import CudaEncoder, cuda_encoder
from spear_hf.mvq.quantizer_files import FORMAT_VERSION, find_quantizer, read_quantizer, write_quantizer
from spear_hf.mvq.refinement import CodeSearch


SCALE_SPEED = 10.0  # the scales are stored as log(scale) / 10, which lets the optimiser move them faster
PASSES = 5  # of refinement, when encoding
# Products of frames with centres always have this many rows, the last ones filled up: the library behind them chooses
# its order of summation by shape, and a frame's codes must not depend on how many frames stand beside it.
TILE_ROWS = 256  # on a CPU; other devices take CHUNK_ROWS, as small products leave most of them idle
CHUNK_ROWS = 2048  # frames in work at a time: 2 * CHUNK_ROWS * codebooks * codebook_size floats, 64 MiB for 16 of 256


@dataclass(frozen=True)
class QuantizerConfig:
    """Shape of a quantiser, and what its codes are the codes of."""

    feature_size: int
    """Channels of a frame of features."""

    num_codebooks: int
    """Codes per frame; a power of two (paper: 16 for speech, 8 for audio)."""

    codebook_size: int = 256
    """Centres per codebook."""

    normalize: bool = False
    """Standardise features by the stored mean and standard deviation per channel (paper: speech yes, audio no)."""

    teacher: str | None = None
    """What the features come from: a Hub id, `kaldi-mfcc`, `module:factory`."""

    teacher_layer: int | None = None
    """The teacher's hidden layer."""

    teacher_revision: str | None = None
    """Commit of the teacher's weights."""

    frame_rate: float | None = None
    """Frames a second."""

    provenance: dict[str, Any] = field(default_factory=dict)
    """How the quantiser was made, as JSON values; informative, no part of `quantizer_id`."""

    def __post_init__(self) -> None:
        for name in ("feature_size", "num_codebooks", "codebook_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}.")
        if self.num_codebooks & (self.num_codebooks - 1):
            raise ValueError(f"num_codebooks must be a power of two (pairs are merged), not {self.num_codebooks}.")
        if self.codebook_size < 2:
            raise ValueError("codebook_size must be at least 2, not 1.")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize must be true or false, not {self.normalize!r}.")
        if self.frame_rate is not None:
            if isinstance(self.frame_rate, (str, bool)) or not 0 < self.frame_rate < math.inf:
                raise ValueError(f"frame_rate must be positive (frames a second), not {self.frame_rate!r}.")
            object.__setattr__(self, "frame_rate", float(self.frame_rate))
        for name, kind, what in (
            ("teacher", str, "a name"),
            ("teacher_layer", int, "a whole number"),
            ("teacher_revision", str, "a name"),
            ("provenance", dict, "an object"),
        ):
            value = getattr(self, name)
            if (value is not None or kind is dict) and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {what}, not {value!r}.")
        try:
            # What comes back from config.json must be what went in, so tuples become lists here already.
            plain = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance must hold plain JSON values: {error}.") from error
        object.__setattr__(self, "provenance", plain)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizerConfig":
        """ValueError names what is unknown or missing."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"feature_size", "num_codebooks", "codebook_size"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"Settings of a quantiser: unknown {unknown}, missing {missing}; known are {sorted(known)}. "
                "Was it written by a newer spear_hf?"
            )
        return cls(**values)


class QuantizerLosses(NamedTuple):
    """Scalars; `total` is what training minimises."""

    reconstruction: Tensor  # sum |decoded - x|^2 / sum |x - mean|^2: moves the centres
    classifier: Tensor  # cross-entropy of the refined codes: moves the classifier
    logits_entropy: Tensor  # 1 - entropy of the mean softmax / log(size): moves the classifier
    index_entropy: Tensor  # 1 - entropy of the codes' frequencies / log(size); no gradient

    @property
    def total(self) -> Tensor:
        """What is minimised: the sum, with 0.01 of the entropy term."""
        return self.reconstruction + self.classifier + 0.01 * self.logits_entropy


class _Encoder:
    """What encoding needs of the parameters, computed once for their present values."""

    def __init__(self, weight: Tensor, bias: Tensor, centers: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.search = CodeSearch(centers)
        self.fused: CudaEncoder | None = cuda_encoder(weight, bias, self.search)

    def encode(self, features: Tensor, passes: int) -> Tensor:
        """(frames, dim) normalised -> int64 (frames, codebooks)."""
        shape = (features.shape[0], self.search.num_codebooks, self.search.codebook_size)
        codes = features.new_empty(shape[:2], dtype=torch.int64)
        costs = features.new_empty(shape if passes else (0, *shape[1:]))
        tile_rows = TILE_ROWS if features.device.type == "cpu" else CHUNK_ROWS
        for start in range(0, features.shape[0], tile_rows):
            tile = features[start : start + tile_rows]
            rows = tile.shape[0]
            tile = F.pad(tile, (0, 0, 0, tile_rows - rows))
            logits = torch.addmm(self.bias, tile, self.weight.T).view(tile_rows, *shape[1:])
            codes[start : start + rows] = logits[:rows].argmax(dim=2)
            if passes:
                costs[start : start + rows] = self.search.linear_costs(tile)[:rows]
        return self.search.refine(costs, codes, passes) if passes else codes


class MultiCodebookQuantizer(nn.Module):
    """`encode` features to codes, `decode` codes to features; calling it gives the losses that train it.

    A frame's codes depend on nothing but the frame, the quantiser, the machine and torch's version: frames are taken
    through matrix products of one fixed shape (TILE_ROWS), and everything after those is computed per frame.
    Beside 3 * codebooks * codebook_size floats a feature channel of weights (6 with the kernels of cuda_encoder.py,
    which NVIDIA GPUs take for codebooks of 256), encoding keeps the Gram matrix of the centres, (codebooks *
    codebook_size)^2 floats (64 MiB for 16 codebooks of 256), until the parameters change.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, feature_size: int, codebook_size: int, num_codebooks: int, **metadata: Any) -> None:
        """`metadata`: the other fields of QuantizerConfig. Training starts from QuantizerTrainer's own parameters."""
        super().__init__()
        self.config = QuantizerConfig(feature_size, num_codebooks, codebook_size, **metadata)
        self.to_logits = nn.Linear(feature_size, num_codebooks * codebook_size)
        self.centers = nn.Parameter(
            self.to_logits.weight.detach().clone().view(num_codebooks, codebook_size, feature_size)
        )
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        persistent = self.config.normalize
        self.register_buffer("feature_mean", torch.zeros(feature_size), persistent=persistent)
        self.register_buffer("feature_std", torch.ones(feature_size), persistent=persistent)
        self._encoder: tuple[Any, _Encoder] | None = None
        self._identity: tuple[Any, str] | None = None

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> "MultiCodebookQuantizer":
        """A quantiser with fresh parameters."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(config)})

    # Features to codes and back

    @torch.no_grad()
    def encode(self, features: Tensor, refine_iters: int = PASSES) -> Tensor:
        """(..., feature_size) -> codes (..., num_codebooks), uint8 up to 256 centres, else int64.

        Any floating-point type on any device; the work is done in float32 on the quantiser's device, the codes come
        back on that of the features. Frames are taken CHUNK_ROWS at a time, so memory does not grow with their number.
        ValueError for a wrong shape or type, or values that are not finite.
        """
        if refine_iters < 0:
            raise ValueError(f"refine_iters must be at least 0, not {refine_iters}.")
        flat = self._flattened(features)
        dtype = torch.uint8 if self.config.codebook_size <= 256 else torch.int64
        codes = torch.empty(flat.shape[0], self.config.num_codebooks, dtype=dtype, device=flat.device)
        with full_precision(self.centers.device):
            encoder = self._current_encoder()
            if encoder.fused:
                found = encoder.fused.encode(flat, self.feature_mean, self.feature_std, refine_iters)
                if found is not None:
                    return found.to(codes).view(*features.shape[:-1], -1)
            for start in range(0, flat.shape[0], CHUNK_ROWS):
                chunk = self._normalized(flat[start : start + CHUNK_ROWS], start)
                codes[start : start + CHUNK_ROWS] = encoder.encode(chunk, refine_iters).to(codes)
        return codes.view(*features.shape[:-1], self.config.num_codebooks)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., num_codebooks) -> float32 features (..., feature_size), on the quantiser's device."""
        config = self.config
        if codes.is_floating_point() or codes.dtype == torch.bool or codes.shape[-1:] != (config.num_codebooks,):
            raise ValueError(
                f"codes must be integers (..., {config.num_codebooks}), not {codes.dtype} {tuple(codes.shape)}; "
                "unpack_codes() first if they are packed into bytes."
            )
        flat = codes.to(self.centers.device, torch.int64).reshape(-1, config.num_codebooks)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < config.codebook_size:
            bad = int(flat.min()) if int(flat.min()) < 0 else int(flat.max())
            raise ValueError(f"code {bad} is outside 0..{config.codebook_size - 1}; leave out padding (-100) first.")
        features = self._sum_of_centers(self._scaled_centers(), flat) * self.feature_std + self.feature_mean
        return features.view(*codes.shape[:-1], config.feature_size)

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes (..., num_codebooks) -> uint8 (..., bytes): pairs of neighbours share a byte while they fit in one."""
        size = self.config.codebook_size
        if size > 256:
            raise ValueError(f"codes of codebook_size {size} do not fit into bytes; store them as they are.")
        packed = codes.to(torch.int64)
        while size**2 <= 256 and packed.shape[-1] > 1:
            packed = packed[..., 0::2] + size * packed[..., 1::2]
            size **= 2
        return packed.to(torch.uint8)

    def unpack_codes(self, packed: Tensor) -> Tensor:
        """The inverse of `pack_codes`; uint8."""
        size, count = self.config.codebook_size, self.config.num_codebooks
        width = self.pack_codes(torch.zeros(count, dtype=torch.uint8)).shape[0]
        if packed.shape[-1] != width:
            raise ValueError(f"packed codes must be (..., {width}) for this quantiser, not {tuple(packed.shape)}.")
        digits = size ** torch.arange(count // width, device=packed.device)
        codes = packed.to(torch.int64)[..., None] // digits % size
        return codes.flatten(-2).to(torch.uint8)

    @torch.no_grad()
    def mean_estimate(self) -> Tensor:
        """Mean of the training features (feature_size,), as far as a codebook's centres are used equally often."""
        return self._scaled_centers().mean(dim=1).sum(dim=0) * self.feature_std + self.feature_mean

    # Training

    def forward(self, features: Tensor, refine_iters: int = 2) -> QuantizerLosses:
        """The losses of frames (..., feature_size); the search for the codes has no gradient."""
        with full_precision(self.centers.device):
            frames = self._normalized(self._flattened(features))
            centers = self._scaled_centers()
            shape = (-1, self.config.num_codebooks, self.config.codebook_size)
            logits = F.linear(frames, self._scaled_weight(), self.to_logits.bias).view(shape)
            with torch.no_grad():
                search = CodeSearch(centers)
                codes = search.refine(search.linear_costs(frames), logits.argmax(dim=2), refine_iters)
                spread = (frames - search.offset).square().sum()
            reconstruction = (self._sum_of_centers(centers, codes) - frames).square().sum() / (spread + 1e-20)
            log_probabilities = logits.log_softmax(dim=2)
            classifier = -log_probabilities.gather(2, codes[..., None]).mean()
            places = codes + shape[2] * torch.arange(shape[1], device=codes.device)
            counts = torch.bincount(places.flatten(), minlength=shape[1] * shape[2]).view(shape[1:])
            return QuantizerLosses(
                reconstruction,
                classifier,
                _missing_entropy(log_probabilities.exp().mean(dim=0)),
                _missing_entropy(counts / codes.shape[0]),
            )

    # Loading and saving

    @property
    def quantizer_id(self) -> str:
        """32 hexadecimal digits that name the codes: a hash of the parameters, shape, normalisation and teacher."""
        key = self._versions()
        if self._identity is None or key is None or self._identity[0] != key:
            settings = asdict(self.config)
            del settings["provenance"]
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for name, tensor in sorted(self._tensors().items()):
                digest.update(f"{name} {list(tensor.shape)}".encode())
                digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
            self._identity = key, digest.hexdigest()[:32]
        return self._identity[1]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `config.json` and `model.safetensors` (quantizer_files.py); other files of the folder stay."""
        config = {"format_version": FORMAT_VERSION, **asdict(self.config), "quantizer_id": self.quantizer_id}
        write_quantizer(save_directory, config, self._tensors())

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "MultiCodebookQuantizer":
        """A quantiser from a folder or a Hub id; refuses whatever is not complete and understood (ValueError)."""
        folder = find_quantizer(name_or_path, revision)
        values, tensors = read_quantizer(folder)
        recorded = values.pop("quantizer_id", None)
        quantizer = cls._from_tensors(QuantizerConfig.from_dict(values), tensors, str(folder))
        if recorded not in (None, quantizer.quantizer_id):
            raise ValueError(
                f"{folder}: the content gives quantizer_id {quantizer.quantizer_id}, config.json says {recorded}: an "
                "interrupted save, or edited by hand. Save it again, or remove the line quantizer_id to accept it."
            )
        return quantizer.to(device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload quantizer",
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes to a model repository, made if need be; the commit's address.

        Both files go in one commit on the branch as it was found: an upload that breaks off leaves the branch as it
        was, and the same call again goes on. The branch `revision` is made if need be.

        Raises:
            ValueError: `private` was asked for, and the repository is there and public.
            huggingface_hub.errors.HfHubHTTPError: the Hub refused, for instance as somebody committed meanwhile.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        if private and found.private is False:
            raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or choose another.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # Not upload_folder, which since huggingface_hub 2 may spread its files over several commits.
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path.name, path) for path in sorted(Path(folder).iterdir())],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=found.sha,
            )
        return str(commit.commit_url)

    @classmethod
    def from_multi_quantization(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        **metadata: Any,
    ) -> "MultiCodebookQuantizer":
        """From the state dict of a `multi_quantization.Quantizer`; its `id_buf` goes into the provenance.

        `mean` and `std` (feature_size,): what the features were standardised with before they reached that quantiser.
        `metadata`: fields of QuantizerConfig other than the shape.
        """
        tensors = dict(state_dict)
        identity = tensors.pop("id_buf", None)
        centers = tensors.get("centers")
        if identity is None or centers is None or centers.ndim != 3:
            raise ValueError(
                f"not the state dict of a multi_quantization.Quantizer; its keys are {sorted(state_dict)}."
            )
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together.")
        if mean is not None and std is not None:
            tensors |= {"feature_mean": mean, "feature_std": std}
        provenance = {"multi_quantization_id": bytes(identity.tolist()).decode(), **metadata.pop("provenance", {})}
        num_codebooks, codebook_size, feature_size = centers.shape
        config = QuantizerConfig(
            feature_size, num_codebooks, codebook_size, normalize=mean is not None, provenance=provenance, **metadata
        )
        tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}
        return cls._from_tensors(config, tensors, "the state dict")

    @classmethod
    def _from_tensors(
        cls, config: QuantizerConfig, tensors: Mapping[str, Tensor], source: str
    ) -> "MultiCodebookQuantizer":
        with torch.device("meta"):
            quantizer = cls.from_config(config)
        expected = quantizer.state_dict()
        missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        if missing or unexpected:
            raise ValueError(f"{source}: missing tensors {missing}, unexpected tensors {unexpected}.")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{source}: {name} is {found}, not torch.float32 {tuple(expected[name].shape)}.")
            if not tensor.isfinite().all():
                raise ValueError(f"{source}: {name} holds values that are not finite; the training diverged.")
        if "feature_std" in tensors and not (tensors["feature_std"] > 0).all():
            raise ValueError(f"{source}: feature_std must be positive in every channel.")
        quantizer = quantizer.to_empty(device="cpu")
        nn.init.zeros_(quantizer.feature_mean)
        nn.init.ones_(quantizer.feature_std)
        quantizer.load_state_dict(tensors)
        return quantizer.eval()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()}

    # Parameters as they are used

    def _scaled_centers(self) -> Tensor:
        return (SCALE_SPEED * self.centers_scale).exp() * self.centers

    def _scaled_weight(self) -> Tensor:
        return (SCALE_SPEED * self.logits_scale).exp() * self.to_logits.weight

    def _sum_of_centers(self, centers: Tensor, codes: Tensor) -> Tensor:
        """(codebooks, size, dim), int64 (frames, codebooks) -> (frames, dim)."""
        count, size, _ = centers.shape
        rows = codes + size * torch.arange(count, device=codes.device)
        return F.embedding_bag(rows, centers.flatten(0, 1), mode="sum")

    def _flattened(self, features: Tensor) -> Tensor:
        if features.ndim == 0 or features.shape[-1] != self.config.feature_size or not features.is_floating_point():
            raise ValueError(
                f"features must be floating-point numbers (..., {self.config.feature_size}), not {features.dtype} "
                f"{tuple(features.shape)}; does the quantiser belong to this teacher and layer?"
            )
        return features.reshape(-1, self.config.feature_size)

    def _normalized(self, frames: Tensor, first: int = 0) -> Tensor:
        """(frames, dim) as given -> float32 on the quantiser's device, standardised."""
        frames = frames.to(self.centers.device, torch.float32)
        if not frames.isfinite().all():
            row, channel = (~frames.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"features are not finite: {frames[row, channel].item()} in channel {channel} of frame {first + row}; "
                "look for silence divided by its own level, or float16 overflow, in the teacher."
            )
        return (frames - self.feature_mean) / self.feature_std if self.config.normalize else frames

    def _versions(self) -> tuple[Any, ...] | None:
        """Changes whenever a parameter or buffer does; None if that cannot be told (inference tensors)."""
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return (self.config, *((tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors))

    def _current_encoder(self) -> _Encoder:
        key = self._versions()
        if self._encoder is None or key is None or self._encoder[0] != key:
            self._encoder = None  # the old one's memory goes before the new one's comes
            bias = self.to_logits.bias.detach()
            self._encoder = key, _Encoder(self._scaled_weight(), bias, self._scaled_centers())
        return self._encoder[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None, "_identity": None}


def _missing_entropy(probabilities: Tensor) -> Tensor:
    """(codebooks, size) -> how far their mean entropy stays below log(size), as a share of it."""
    smoothed = probabilities + 1e-20
    entropy = -(smoothed * smoothed.log()).sum(dim=1).mean()
    return 1 - entropy / math.log(probabilities.shape[1])


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 throughout: no autocast, no TF32 or bfloat16 shortcuts, whatever is set around it.

    Those of float16 numbers have their sums in float32.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        matmul = torch.backends.cuda.matmul
        for setting in ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"):
            if getattr(matmul, setting, False):
                setattr(matmul, setting, False)
                stack.callback(setattr, matmul, setting, True)
        if not hasattr(matmul, "fp32_precision"):  # torch before 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        of_cpu: Any = torch.backends.mkldnn
        for backend in (matmul, of_cpu.matmul) if hasattr(matmul, "fp32_precision") else ():
            value = backend.fp32_precision
            if value in ("tf32", "bf16"):
                backend.fp32_precision = "ieee"
                stack.callback(setattr, backend, "fp32_precision", value)
        yield
