"""From a folder to a model and its tokenizer: of which class, in which precision, on which device.

Every model directory of ours, and a decoder-only model of a covered family (families.py), becomes our GPT. Any other is
opened by Transformers as the class that its config.json names, provided that the files hold all of that class. Where a
head is missing Transformers would invent one, and the logits would be noise; then the model is opened without a head.
"""

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import device as devices
import families
import family_tables
import files
from checkpoint import CheckpointManager
from hub import read_json
from model_directory import CONFIG, HF_WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, status
from registry.catalogue import ARCHITECTURES, DTYPE_NAMES
from registry.plain_tokenizer import PlainTokenizer
from tensor_files import stored_tensors
from words import first_line

ENCODER, DECODER, SEQ2SEQ = ARCHITECTURES
HEADED = {ENCODER: "AutoModelForMaskedLM", DECODER: "AutoModelForCausalLM", SEQ2SEQ: "AutoModelForSeq2SeqLM"}
QUANTIZATIONS = ("8bit", "4bit")
# Keyword arguments of Transformers' from_pretrained that a configuration may hold; the others are ours to decide.
LOAD_CONFIG = {
    "attn_implementation": str,
    "device_map": (str, dict),
    "max_memory": dict,
    "offload_folder": str,
    "use_safetensors": bool,
    "variant": str,
}

NO_OPTIONS = {"self", "text", "texts", "kwargs", "tokenizer_kwargs"}  # among the parameters of a tokenizer's call

# ---- precision and device


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A precision by any of its names, in any case; None, which "auto" is too, stands for the checkpoint's own.

    Raises ValueError for an unknown name and for what is no precision of weights.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    name = str(dtype).lower().removeprefix("torch.")
    if dtype is None or name == "auto":
        return None
    if not isinstance(dtype, str) or DTYPE_NAMES.get(name, name) not in devices.DTYPES:
        known = ", ".join(["auto", *DTYPE_NAMES])
        raise ValueError(f"dtype={dtype} is no precision of weights; there are {known}")
    return devices.DTYPES[DTYPE_NAMES.get(name, name)]


def coerce_device(device: str | int | torch.device | None) -> torch.device:
    """A device by name, by the number of a GPU, or as torch has it; None and "auto" are the best one that is there.

    Raises ValueError, which says what there is, for one that is not there.
    """
    known = device is None or (isinstance(device, str | torch.device | int) and not isinstance(device, bool))
    name = "auto" if device is None else str(device).strip().lower()
    name = f"cuda:{name}" if name.isdecimal() else name
    try:
        if not known:
            raise ValueError(f"device={device} is no name, no number and no torch.device")
        return devices.pick_device(name)
    except ValueError as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"{error} (here: {', '.join(there)})") from None


# ---- what a folder holds


def read_arch(folder: Path, expected: str | None = None) -> str:
    """encoder_only, decoder_only or seq2seq, as config.json says.

    `expected` is taken where it does not say. Raises ValueError when it says something else, or when nobody says.
    """
    if expected not in (None, *HEADED):
        raise ValueError(f"arch={expected} is none of {', '.join(HEADED)}")
    found = DECODER if status(folder) else _arch_of(read_json(folder / CONFIG))
    if found is None and expected is None:
        raise ValueError(f"{folder / CONFIG} does not say what the model is: give arch, one of {', '.join(HEADED)}")
    if found and expected not in (None, found):
        raise ValueError(f"{folder} holds a model that is {found}, not {expected}")
    return found or expected


def _arch_of(hf: Mapping[str, Any]) -> str | None:
    kind, named = hf.get("model_type"), _architecture(hf)
    if kind in family_tables.FAMILIES or kind == family_tables.WRAPPER:
        return DECODER
    if named.endswith("EncoderModel"):
        return ENCODER
    if hf.get("is_encoder_decoder"):
        return SEQ2SEQ
    names = import_transformers().models.auto.modeling_auto
    masked, causal = names.MODEL_FOR_MASKED_LM_MAPPING_NAMES, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if named.endswith("ForMaskedLM") or named in masked.values():
        return ENCODER
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return DECODER
    # A BERT can be built as a decoder too: where no class is named, what a family is known for comes first.
    tables = {SEQ2SEQ: names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, ENCODER: masked, DECODER: causal}
    return next((arch for arch in (ENCODER, SEQ2SEQ, DECODER) if kind in tables[arch]), None)


def _architecture(hf: Mapping[str, Any]) -> str:
    """The class that a config.json names, or ""."""
    return (hf.get("architectures") or [""])[0]


def is_covered(folder: Path) -> bool:
    """Whether our GPT computes the model in a folder of Hugging Face's."""
    hf = read_json(folder / CONFIG)
    try:
        family, _ = families.family_of(hf, folder)
    except ValueError:
        return False
    base = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    kinds = ("Model", "TextModel", "ForConditionalGeneration")
    if _architecture(hf) not in ("", family.architecture, *(base + kind for kind in kinds)):  # another kind of head
        return False
    try:
        config = families.read_config(hf, folder / CONFIG)
    except ValueError:  # a variant of the family that Transformers computes and GPT does not
        return False
    return config.tie_word_embeddings or any(name.endswith("lm_head.weight") for name in stored_tensors(folder))


# ---- loading


def load(
    folder: str | Path,
    *,
    arch: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = "cpu",
    quantization: str | None = None,
    attentions: bool = False,
    trust_remote_code: bool = False,
    load_config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model in a folder, in eval mode: our GPT where it computes it, else Transformers' class.

    quantization: "8bit" or "4bit", by bitsandbytes. attentions: computed so that the weights can be asked for.
    load_config: further arguments for Transformers' from_pretrained (LOAD_CONFIG), through which the model then goes.
    Raises FileNotFoundError where there is no model; ValueError for one that does not open, would run code of its own
    without trust_remote_code, or needs a package that is not installed.
    """
    folder, device, dtype = files.expanded(folder), coerce_device(device), resolve_dtype(dtype)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization={quantization} is none of {', '.join(QUANTIZATIONS)}")
    options, arch = _checked_options(load_config, attentions), read_arch(folder, arch)
    ours = bool(status(folder))
    if quantization or options:
        if ours and not (folder / HF_WEIGHTS).exists():
            asked = f"quantization={quantization}" if quantization else f"load_config with {', '.join(options)}"
            raise ValueError(f"{asked} is Transformers' to do, and only our GPT opens {folder}")
    elif ours:
        return CheckpointManager.load_model(folder, device)[0].to(dtype).eval()
    elif arch == DECODER and is_covered(folder):
        return families.load_pretrained(folder, dtype, device).eval()
    if attentions:
        options["attn_implementation"] = "eager"  # the others never have the weights as a whole
    return _load_through_transformers(folder, arch, dtype, device, quantization, trust_remote_code, options).eval()


def _checked_options(load_config: Mapping[str, Any] | None, attentions: bool) -> dict[str, Any]:
    options = dict(load_config or {})
    problems = [f"{key} is none of {', '.join(LOAD_CONFIG)}" for key in options if key not in LOAD_CONFIG]
    wrong = [key for key in options if key in LOAD_CONFIG and not isinstance(options[key], LOAD_CONFIG[key])]
    problems += [f"{key}={options[key]!r} is a {type(options[key]).__name__}" for key in wrong]
    if attentions and options.get("attn_implementation", "eager") != "eager":
        problems.append(f"attn_implementation={options['attn_implementation']} captures no attentions; eager does")
    if problems:
        raise ValueError(f"load_config: {'; '.join(problems)}")
    return options


def _load_through_transformers(
    folder: Path,
    arch: str,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: str | None,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> nn.Module:
    transformers, hf = import_transformers(), read_json(folder / CONFIG)
    if not trust_remote_code:
        kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        _refuse_code(folder / CONFIG, hf.get("model_type") in kinds)
    if quantization or "quantization_config" in hf or "device_map" in options:
        # Quantised weights are put in place as they are read, and cannot be moved or cast afterwards.
        _require("accelerate", "a quantised or distributed model")
        options.setdefault("device_map", {"": device})
    if quantization:
        options["quantization_config"] = quantization_config(quantization, dtype)
    options |= {"dtype": dtype or "auto", "local_files_only": True, "trust_remote_code": trust_remote_code}
    for model_class in _classes(transformers, hf, arch, trust_remote_code):
        model, lacking = _open(model_class, folder, options)
        if lacking and all("pooler" in name.split(".") for name in lacking):
            model, lacking = _open(model_class, folder, options | {"add_pooling_layer": False})
        if not lacking:
            return model if "device_map" in options else model.to(device)
    raise ValueError(
        f"{folder} lacks {len(lacking)} tensors of the model that its {CONFIG} describes: {', '.join(lacking[:3])}"
    )


def _classes(transformers: ModuleType, hf: Mapping[str, Any], arch: str, trust_remote_code: bool) -> list[type]:
    """The classes to open a model as, the best one first; the last one has no head."""
    own = hf.get("auto_map") if trust_remote_code else None
    bare = [transformers.AutoModel]
    if own:
        return [getattr(transformers, name) for name in (HEADED[arch], "AutoModel") if name in own] or bare
    named = _architecture(hf)
    found = getattr(transformers, named, None)
    # What a model was trained with besides a language-model head (ForPreTraining) gives outputs under other names.
    usable = isinstance(found, type) and issubclass(found, nn.Module) and not named.endswith("ForPreTraining")
    return [found if usable else getattr(transformers, HEADED[arch]), *bare]


def _open(model_class: type, folder: Path, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model, and the names of tensors that are not in the folder and so are random numbers."""
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # the libraries below have errors of their own
        raise ValueError(f"{folder} does not open as {model_class.__name__}: {first_line(error)}") from error
    return model, sorted(report["missing_keys"])


def quantization_config(quantization: str, dtype: torch.dtype | None) -> Any:
    """bitsandbytes' settings for 8 bit (Dettmers et al. 2022) or 4 (NF4, Dettmers et al. 2023).

    `dtype` is that of what is not quantised and, with 4 bits, of the matrix products; None: bfloat16.
    """
    _require("bitsandbytes", f"quantization={quantization}")
    settings = import_transformers().BitsAndBytesConfig
    if quantization == "8bit":
        return settings(load_in_8bit=True)
    return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Transformers' tokenizer for the model in a folder; `options` are those of its from_pretrained.

    Without that package, and with a tokenizer.json, a PlainTokenizer. Raises ValueError where there is none that opens,
    or one would run code of its own without trust_remote_code.
    """
    folder = files.expanded(folder)
    if (folder / TOKENIZER).exists() and not _is_installed("transformers"):
        return PlainTokenizer(folder, **options)
    transformers = import_transformers()
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    if not trust_remote_code:
        name = settings.get("tokenizer_class") or ""
        _refuse_code(folder / TOKENIZER_CONFIG, any(hasattr(transformers, f"{name}{fast}") for fast in ("", "Fast")))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # a broken file, or a package that is not installed
        raise ValueError(f"{folder} has no tokenizer that opens: {first_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Transformers makes one out of nothing, to which every word is unknown.
        raise ValueError(f"{folder} has no tokenizer: none of its files holds a vocabulary")
    return tokenizer


def call_options() -> frozenset[str]:
    """The arguments that a call of any tokenizer takes beside the texts."""
    kind = import_transformers().PreTrainedTokenizerBase if _is_installed("transformers") else PlainTokenizer
    return frozenset(inspect.signature(kind.__call__).parameters) - NO_OPTIONS


def _refuse_code(path: Path, known: bool) -> None:
    """Raise ValueError where a configuration can be followed only by running code that came with it."""
    own = (read_json(path).get("auto_map") or {}) if path.exists() else {}
    own = own.values() if isinstance(own, dict) else [own]
    names = [name for value in own for name in (value if isinstance(value, list | tuple) else [value]) if name]
    scripts = sorted({f"{name.split('--')[-1].rsplit('.', 1)[0]}.py" for name in names})
    if scripts and not known:
        raise ValueError(f"{path} is for code of its own: trust_remote_code=true would run {', '.join(scripts)}")


# ---- optional packages


def import_transformers() -> ModuleType:
    _require("transformers", "a model that our own GPT does not compute")
    import transformers

    return transformers


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _require(package: str, what: str) -> None:
    if not _is_installed(package):
        raise ValueError(f"{what} needs the package {package}, which is not installed: pip install {package}")
