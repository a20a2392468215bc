"""Weights from disk: the authors' released checkpoints, loaded strictly, and our models under the released names.

Nothing is ever filled in silently: every parameter gets a tensor, every tensor of the file a parameter, or the error
lists the names. The only tensors passed over are those that the released forward never reads (`UNREAD`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mage_core.files import check_place, data_folder, expanded, sha256, write_whole
from mage_core.mage import MAGE, MAGEConfig
from mage_core.vqvae import VQVAE, VQVAEConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: names the file, the rule and the remedy."""


# ---------------------------------------------------------------- names: ours, and the released

UNREAD = (r"ma_encoder\.blocks\.\d+\.ln_(q|kv)\.(weight|bias)", r".*\.num_batches_tracked")
FIRST_STAGE = "first_stage_model."

_VQVAE_NAMES = (
    (r"codebook", r"codebook.embedding.weight"),
    (r"(encoder|decoder)\.(\d+)\.residual\.(\d+)\.(\w+)", r"\1.\2.block.\3.\4"),
    (r"(encoder|decoder)\.(\d+)\.skip\.(\w+)", r"\1.\2.id_path.\3"),
    (r"(encoder|decoder)\.(\d+)\.(\w+)", r"\1.\2.\3"),
)

_MAGE_NAMES = (
    (r"visual_tokens\.embedding", r"visual_token_embedding.weight"),
    (r"visual_tokens\.convolution\.weight", r"conv.0.weight"),
    (r"visual_tokens\.row_positions", r"H_positional_embedding"),
    (r"visual_tokens\.column_positions", r"W_positional_embedding"),
    (r"text_encoder\.words", r"text_encoder.token_embedding.weight"),
    (r"text_encoder\.positions", r"text_encoder.positions.weight"),
    (r"text_encoder\.norm\.(\w+)", r"text_encoder.layer_norm.\1"),
    (r"text_encoder\.final_norm\.(\w+)", r"text_encoder.ln_text_final.\1"),
    (r"text_encoder\.projection\.(\w+)", r"text_encoder.text_projection.\1"),
    (r"text_encoder\.layers\.(\d+)\.qkv\.(\w+)", r"text_encoder.transformer.layers.\1.self_attn.in_proj_\2"),
    (r"text_encoder\.layers\.(\d+)\.out\.(\w+)", r"text_encoder.transformer.layers.\1.self_attn.out_proj.\2"),
    (r"text_encoder\.layers\.(\d+)\.norm_([12])\.(\w+)", r"text_encoder.transformer.layers.\1.norm\2.\3"),
    (r"text_encoder\.layers\.(\d+)\.up\.(\w+)", r"text_encoder.transformer.layers.\1.linear1.\2"),
    (r"text_encoder\.layers\.(\d+)\.down\.(\w+)", r"text_encoder.transformer.layers.\1.linear2.\2"),
    (r"motion_anchor\.layers\.(\d+)\.qkv\.(\w+)", r"ma_encoder.blocks.\1.attn.in_proj_\2"),
    (r"motion_anchor\.layers\.(\d+)\.out\.(\w+)", r"ma_encoder.blocks.\1.attn.out_proj.\2"),
    (r"motion_anchor\.layers\.(\d+)\.norm\.(\w+)", r"ma_encoder.blocks.\1.ln_2.\2"),
    (r"motion_anchor\.layers\.(\d+)\.mlp\.up\.(\w+)", r"ma_encoder.blocks.\1.mlp.c_fc.\2"),
    (r"motion_anchor\.layers\.(\d+)\.mlp\.down\.(\w+)", r"ma_encoder.blocks.\1.mlp.c_proj.\2"),
    (r"motion_anchor\.speed", r"speed_embedding"),
    (r"motion_anchor\.adain\.widen\.weight", r"conv_d2.weight"),
    # the released code takes "mu" for the factor and "var" for the term
    (r"motion_anchor\.adain\.scale\.(\d+)\.(\w+)", r"adain.conv_mu.\1.\2"),
    (r"motion_anchor\.adain\.shift\.(\d+)\.(\w+)", r"adain.conv_var.\1.\2"),
    (r"posterior\.blocks\.(\d+)\.conv_([12])\.weight", r"conv3d.\1.conv\2.weight"),
    (r"posterior\.blocks\.(\d+)\.norm_([12])\.(\w+)", r"conv3d.\1.bn\2.\3"),
    (r"posterior\.blocks\.(\d+)\.shortcut\.([01])\.(\w+)", r"conv3d.\1.downsample.\2.\3"),
    (r"posterior\.mean\.(\w+)", r"conv_mu2.\1"),
    (r"posterior\.log_variance\.(\w+)", r"conv_var2.\1"),
    (r"generator\.time_positions", r"generate_model.T_positional_embedding"),
    (r"generator\.anchor_in\.(\w+)", r"generate_model.context_linear.\1"),
    (r"generator\.frames_in\.(\w+)", r"generate_model.in_linear.\1"),
    (r"generator\.logits\.(\w+)", r"generate_model.out.\1"),
    (r"generator\.layers\.(\d+)\.qkv\.(\w+)", r"generate_model.blocks.\1.attn.in_proj_\2"),
    (r"generator\.layers\.(\d+)\.out\.(\w+)", r"generate_model.blocks.\1.attn.out_proj.\2"),
    (r"generator\.layers\.(\d+)\.norm_([12])\.(\w+)", r"generate_model.blocks.\1.ln_\2.\3"),
    (r"generator\.layers\.(\d+)\.mlp\.up\.(\w+)", r"generate_model.blocks.\1.mlp.c_fc.\2"),
    (r"generator\.layers\.(\d+)\.mlp\.down\.(\w+)", r"generate_model.blocks.\1.mlp.c_proj.\2"),
)


def released_names(model: VQVAE | MAGE) -> dict[str, str]:
    """Our name -> released name for every tensor of a model; ValueError for a part that the released code lacks."""
    rules = _VQVAE_NAMES if isinstance(model, VQVAE) else _MAGE_NAMES
    table = {}
    for name in model.state_dict():
        matches = ((re.fullmatch(ours, name), theirs) for ours, theirs in rules)
        table[name] = next((match.expand(theirs) for match, theirs in matches if match), None)
    foreign = [name for name, released in table.items() if released is None]
    if foreign:
        raise ValueError(f"no released name for {_listed(foreign)}: only models without options of our own "
                         "(every option of ours off) can be written or read under the released names")
    return table


def to_released(vqvae: VQVAE, mage: MAGE) -> dict[str, Tensor]:
    """Both models' tensors under the released names, as in the authors' checkpoints; the inverse of `load_released`.

    ValueError for a model with parts that the released code lacks.
    """
    for option, value in (("hidden_token", mage.config.hidden_token), ("groups", mage.config.groups > 1),
                          ("still", mage.config.still), ("autoregressive=False", not mage.config.autoregressive)):
        if value:   # a row more, and no name more: or none at all
            raise ValueError(f"this MAGE has the option {option}, which the released code lacks: only models without "
                             "options of our own can be written under the released names")
    first, second = vqvae.state_dict(), mage.state_dict()
    return ({FIRST_STAGE + theirs: first[ours] for ours, theirs in released_names(vqvae).items()}
            | {theirs: second[ours] for ours, theirs in released_names(mage).items()})


# ---------------------------------------------------------------- our own weights, by name

DATASET = ("dataset", "digit_set", "mode", "image_size", "version", "videos")   # what a card tells of a dataset


@dataclass
class Trained:
    """Both stages, what they were trained on, and their card (a dict; see `save`)."""

    vqvae: VQVAE
    mage: MAGE
    card: dict
    path: Path | None = None

    @cached_property
    def dataset(self):
        """The dataset that the weights are for, as their card tells of it (`clips.described`)."""
        from mage_core.clips import described
        return described(self.card)

    @property
    def curve(self) -> list[dict[str, float]]:
        """The second stage's curve, a dict a line; empty where it was not kept.

        Before it comes the curve of the weights that training went on from, where they were of the same dataset:
        samples and seconds add up.
        """
        parts, card = [], self.card
        while card and card["dataset"] == self.card["dataset"]:
            parts.insert(0, card.get("curves", {}).get("mage", []))
            card = card.get("start")
        lines: list[dict[str, float]] = []
        for part in parts:
            before = lines[-1] if lines else {}
            lines += [line | {key: line[key] + before.get(key, 0) for key in ("samples", "seconds")} for line in part]
        return lines

    def add_results(self, rows: Iterable) -> None:
        """Write rows of a results table (`metrics.Row`), and the paper's figures, into the card beside the weights."""
        from mage_core.report import PAPER
        if self.card["dataset"] in PAPER:
            self.card["paper"] = dict(zip(("ssim", "psnr_vqvae", "psnr_mage"), PAPER[self.card["dataset"]][1:]))
        self.card["results"] = [row.as_dict() for row in rows]
        _write_card(self.path, self.card)


def names() -> list[str]:
    """The names of the weights that ship in `data/weights`."""
    return sorted(path.stem for path in (data_folder() / "weights").glob("*.safetensors"))


PRECISIONS = ("full", "half", "int8")


def save(path: str | Path, vqvae: VQVAE, mage: MAGE, about: dict, *, precision: str = "half") -> Trained:
    """Write both stages to one .safetensors file and their card to a .json beside it; the models as they load again.

    `precision` "half" keeps weights in fp16, but for the VQ-VAE's encoder, background and codebook, on which every
    token depends, and the codes' pixels; "int8" keeps MAGE's matrices besides as whole numbers of -127 to 127 with a
    scale for each row; "full" keeps all weights as they are. The card holds `about`, both configurations, the precision
    and the file's SHA-256. ValueError, before anything is written, for another precision, for another ending than
    .safetensors, for a place that cannot be written, for a card that JSON cannot hold or that tells of no dataset, and
    for weights that are not finite.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} does not end in .safetensors, as names of weights do: name them so")
    path = check_place(path)
    _check_card(about)
    tensors = {}
    for stage, model in (("vqvae", vqvae), ("mage", mage)):
        for name, tensor in model.state_dict().items():
            tensor, name = tensor.detach().cpu().contiguous(), f"{stage}.{name}"
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite: such weights make nothing, so train again, "
                                 "at a lower learning rate")
            exact = (not tensor.is_floating_point()
                     or name.startswith(("vqvae.encoder.", "vqvae.codebook", "vqvae.background",
                                         "mage.advection.pixels")))
            if precision == "int8" and stage == "mage" and tensor.ndim == 2 and tensor.numel() > 1_000:
                tensors[name], tensors[name + ROW_SCALES] = _in_whole_numbers(tensor)
            else:
                half = tensor if exact or precision == "full" else tensor.half()
                tensors[name] = half if half.isfinite().all() else tensor   # too large for fp16
    configs = {"vqvae": dataclasses.asdict(vqvae.config), "mage": dataclasses.asdict(mage.config)}
    told = {"configs": configs, "dataset": about["dataset"], **{key: about[key] for key in DATASET if key in about}}
    # under one key, for safetensors writes several in any order: the same weights make the same file
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={"about": json.dumps(told)}))
    _write_card(path, {**about, "configs": configs, "precision": precision, "sha256": sha256(path)})
    return load(path)


ROW_SCALES = ".row_scales"


def _in_whole_numbers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (m n) as int8 (m n) and a scale for each row (m 1): their product is the matrix, but for rounding."""
    scales = matrix.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (matrix / scales).round().to(torch.int8), scales


def _from_whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() * tensors[name + ROW_SCALES] if name + ROW_SCALES in tensors else tensor
            for name, tensor in tensors.items() if not name.endswith(ROW_SCALES)}


def load(name: str | Path) -> Trained:
    """The weights of a name (`names()`) or of a .safetensors file that `save` wrote, in fp32, ready to evaluate.

    CheckpointError where there are none of that name, where the file is damaged (its SHA-256 differs from its card's),
    or where it is not one of ours (`load_released` reads the authors').
    """
    path = expanded(name)
    if path.suffix != ".safetensors":
        path = data_folder() / "weights" / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"no weights are named {str(name)!r}: there are {', '.join(names()) or 'none yet'}; "
                                  "or give the path of a .safetensors file")
    tensors = _from_whole_numbers(read_tensors(path))
    card = _read_card(path)
    found = sha256(path)
    if card.get("sha256", found) != found:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {path.with_suffix('.json').name}; "
                              "take it from the repository again, or train it again")
    try:
        with safe_open(path, "pt") as file:
            told = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        told = told.get("about", told)
        configs = {stage: {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
                   for stage, config in told["configs"].items()}
        models = {"vqvae": VQVAE(VQVAEConfig(**configs["vqvae"])), "mage": MAGE(MAGEConfig(**configs["mage"]))}
        for stage, model in models.items():
            model.load_state_dict({key.removeprefix(f"{stage}."): tensor for key, tensor in tensors.items()
                                   if key.startswith(f"{stage}.")})
        if left := [key for key in tensors if key.partition(".")[0] not in models]:
            raise ValueError(f"no part of it takes {_listed(left)}")
        if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{_listed(bad)} hold values that are not finite")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a file of this project's weights ({str(error).splitlines()[0]}): train "
                              "one with python -m mage_core.training; the authors' checkpoints load with "
                              "weights.load_released") from error
    for key in DATASET:
        if key in told and card.setdefault(key, told[key]) != told[key]:
            raise CheckpointError(f"{path.with_suffix('.json').name} says that {key} is {str(card[key])[:80]!r}, and "
                                  f"{path.name} itself {str(told[key])[:80]!r}: the card is of other weights, or was "
                                  "edited; take it from where the weights are from, or delete it")
    return Trained(models["vqvae"].eval(), models["mage"].eval(), card, path)


def _check_card(about: dict) -> None:
    """ValueError for what cannot be a card: it must name its dataset, and be JSON."""
    from mage_core.clips import described
    try:
        described(about)
    except (KeyError, TypeError) as error:
        raise ValueError(f"what is told of the weights leaves out the dataset's {error}: give the dataset's `about`, "
                         "and what else there is to tell") from error
    for key, value in about.items():
        try:
            json.dumps({key: value})
        except TypeError as error:
            raise ValueError(f"what is told of the weights has a {key} that is not JSON ({error}): make it text, "
                             "numbers, lists or dictionaries") from error


def _write_card(path: Path, card: dict) -> None:
    text = json.dumps(card, indent=1) + "\n"
    write_whole(path.with_suffix(".json"), lambda temporary: temporary.write_text(text))


def _read_card(path: Path) -> dict:
    """The card beside a file of weights; empty where there is none."""
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        if not isinstance(card, dict):
            raise ValueError(f"it holds a {type(card).__name__}")
        return card
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.with_suffix('.json')} is not a card ({error}): take it from the repository "
                              "again") from error


# ---------------------------------------------------------------- loading

def load_released(path: str | Path, *, pixel_range: tuple[float, float] | None = None, alpha: float = 0.001,
                  beta: float = 0.00025, vqvae_config: VQVAEConfig | None = None,
                  mage_config: MAGEConfig | None = None) -> tuple[VQVAE, MAGE]:
    """The authors' checkpoint (.safetensors or a torch file of tensors) as our two models, in fp32, ready to evaluate.

    Sizes come from the tensors' shapes. What shapes cannot tell is `pixel_range` (default: -0.5 to 0.5 for one channel,
    -1 to 1 for more), `alpha`, `beta`, and what else the two configs hold; a config given is checked against the file
    and then used as it is. Raises CheckpointError, naming the file, the rule and the remedy, for files that are
    missing, damaged or foreign, for tensors that are missing, of another shape or left over, and for MAGE+ checkpoints.
    """
    path, tensors = Path(path), read_tensors(path)
    if not any(name.startswith(FIRST_STAGE) for name in tensors):
        raise CheckpointError(f"{path} holds no {FIRST_STAGE}* tensors: a released MAGE checkpoint holds both stages; "
                              "a first stage alone loads with load_released_vqvae")
    first, second = _stages(path, tensors)
    vqvae = _fill(path, VQVAE, vqvae_config or _vqvae_config(path, first, pixel_range), first, FIRST_STAGE)
    mage = _fill(path, MAGE, mage_config or _mage_config(path, second, alpha, beta), second)
    ours, theirs = ((config.groups, config.codebook_size) for config in (mage.config, vqvae.config))
    if ours != theirs:
        raise CheckpointError(f"{path}: MAGE's tokens are of {ours[0]} x {ours[1]} codes, the VQ-VAE's of {theirs[0]} "
                              f"x {theirs[1]}: the two stages do not belong together")
    return vqvae, mage


def load_released_vqvae(path: str | Path, *, pixel_range: tuple[float, float] | None = None,
                        config: VQVAEConfig | None = None) -> VQVAE:
    """The VQ-VAE alone, from the authors' first-stage or whole MAGE checkpoint; errors as in `load_released`."""
    path, tensors = Path(path), read_tensors(path)
    first, _ = _stages(path, tensors)
    return _fill(path, VQVAE, config or _vqvae_config(path, first, pixel_range), first)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors or torch file; never runs code from it.

    A `state_dict` wrapper and a `module.` before every name are taken off. CheckpointError where it cannot be read.
    """
    path = expanded(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a .safetensors file or of a torch checkpoint")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # foreign bytes fail in as many ways as there are bytes
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({first_line}): it must be a .safetensors file or a torch file that holds tensors "
            "alone. Download it again if it is damaged; if it holds other Python objects, save its state_dict to a "
            "file of its own where you trust it") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__} without named tensors: a checkpoint is a "
                              "dictionary of tensors, or one under the key state_dict")
    foreign = [str(name) for name, value in content.items()
               if not (isinstance(name, str) and isinstance(value, Tensor))]
    if foreign:
        raise CheckpointError(f"{path} holds entries that are not tensors: {_listed(foreign)}; "
                              "save its state_dict alone")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def _stages(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First-stage tensors without their prefix, and the others; a file without the prefix is a first stage."""
    first = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in tensors.items() if name.startswith(FIRST_STAGE)}
    second = {name: tensor for name, tensor in tensors.items() if not name.startswith(FIRST_STAGE)}
    if not first:
        first, second = second, {}
    if "codebook.embedding.weight" not in first:
        if second or any("quant_conv." in name for name in first):
            raise CheckpointError(
                f"{path} is a MAGE+ checkpoint: its first stage is a KL autoencoder and has no codebook. Only MAGE, "
                "with a VQ-VAE, is supported; take the checkpoint of MAGE instead")
        raise CheckpointError(f"{path} holds no codebook.embedding.weight, so that it is no checkpoint of the "
                              f"released MAGE or VQ-VAE; it holds {_listed(tensors)}")
    return first, second


def _vqvae_config(path: Path, tensors: dict[str, Tensor], pixel_range: tuple[float, float] | None) -> VQVAEConfig:
    width, channels, kernel, _ = _shape(path, tensors, "encoder.0.weight", 4)
    down = {4: 4, 7: 8}.get(kernel)
    if down is None:
        raise CheckpointError(f"{path}: the first convolution is {kernel} wide; the released VQ-VAEs begin with 4 "
                              "(MNIST) or 7 (CATER)")
    return _config(path, VQVAEConfig, channels=channels, width=width, down=down,
                   codebook_size=_shape(path, tensors, "codebook.embedding.weight", 2)[0],
                   pixel_range=pixel_range or ((-0.5, 0.5) if channels == 1 else (-1.0, 1.0)))


def _mage_config(path: Path, tensors: dict[str, Tensor], alpha: float, beta: float) -> MAGEConfig:
    def count(pattern: str) -> int:
        return len({match.group(1) for match in map(re.compile(pattern).match, tensors) if match})

    codebook_size, width = _shape(path, tensors, "visual_token_embedding.weight", 2)
    stochastic = "conv_mu2.weight" in tensors
    latent = {"latent_channels": _shape(path, tensors, "conv_mu2.weight", 4)[0]} if stochastic else {}
    return _config(path, MAGEConfig, codebook_size=codebook_size, width=width,
                   rows=_shape(path, tensors, "H_positional_embedding", 4)[1],
                   columns=_shape(path, tensors, "W_positional_embedding", 4)[2],
                   clip_length=_shape(path, tensors, "generate_model.T_positional_embedding", 4)[0],
                   vocabulary_size=_shape(path, tensors, "text_encoder.token_embedding.weight", 2)[0],
                   context_length=_shape(path, tensors, "text_encoder.positions.weight", 2)[0],
                   text_layers=count(r"text_encoder\.transformer\.layers\.(\d+)\."),
                   anchor_layers=count(r"ma_encoder\.blocks\.(\d+)\."),
                   axial_layers=count(r"generate_model\.blocks\.(\d+)\."),
                   stochastic=stochastic, alpha=alpha, beta=beta, **latent)


def _shape(path: Path, tensors: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{path} lacks the tensor {name}, which every released checkpoint holds: it is damaged, "
                              f"or another model's; it holds {_listed(tensors)}")
    if tensors[name].ndim != dimensions:
        raise CheckpointError(f"{path}: {name} has the shape {tuple(tensors[name].shape)}; the released one has "
                              f"{dimensions} dimensions")
    return tuple(tensors[name].shape)


def _config(path: Path, kind: Callable, **sizes):
    try:
        return kind(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path} holds a model that cannot be built: {error}") from error


def _fill(path: Path, kind: type[nn.Module], config, tensors: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """A model whose every tensor comes from `tensors` (released names, all of them used)."""
    with torch.device("meta"):   # names and shapes are compared before any memory is taken
        model = kind(config).eval()
    names, wanted = released_names(model), model.state_dict()
    unread = re.compile("|".join(UNREAD))
    missing = [theirs for theirs in names.values() if theirs not in tensors and not unread.fullmatch(theirs)]
    unused = [name for name in tensors.keys() - set(names.values()) if not unread.fullmatch(name)]
    reshaped = [f"{theirs} {tuple(tensors[theirs].shape)} for {tuple(wanted[ours].shape)}"
                for ours, theirs in names.items() if theirs in tensors and tensors[theirs].shape != wanted[ours].shape]
    broken = [name for name in names.values() if name in tensors and not tensors[name].isfinite().all()]
    faults = [f"{what}: {_listed(sorted(found), prefix)}" for what, found in (
        ("missing", missing), ("not part of the model", unused), ("of another shape", reshaped),
        ("with values that are not finite", broken)) if found]
    if faults:
        raise CheckpointError(f"{path} does not hold {config}. Tensors {'; '.join(faults)}. Every parameter must be "
                              "filled and every tensor used: take an undamaged released checkpoint and "
                              "the config that belongs to it")

    def tensor(ours: str, theirs: str) -> Tensor:
        dtype = wanted[ours].dtype
        if theirs in tensors:
            return tensors[theirs].contiguous().to(dtype, copy=True)
        return torch.zeros(wanted[ours].shape, dtype=dtype)   # a counter that the file left out

    model.load_state_dict({ours: tensor(ours, theirs) for ours, theirs in names.items()}, assign=True)
    return model


def _listed(names: Iterable[str], prefix: str = "", most: int = 12) -> str:
    names = [prefix + name for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
