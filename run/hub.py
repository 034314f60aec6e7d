"""Where a model's files are: a directory, or a hub id in the local Hugging Face cache. Nothing is fetched."""

import os
from pathlib import Path

from run.reading import check_start, errors_named, read_json, text_of


def cache() -> Path:
    """The hub's cache, named by the same variables, in the same order, as in huggingface_hub."""
    given = os.environ.get
    home = given("HF_HOME") or os.path.join(given("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: `path` itself, or the snapshot of a hub id in the local hub cache.

    revision: a branch, tag or commit of a hub id, by default main, or the only snapshot where none is called main.
    """
    folder = Path(os.path.expanduser(path))
    if not str(path).strip():
        raise ValueError("the model's path is empty; give a directory or a hub id")
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file; give the directory of the model")
    if os.path.isdir(folder):
        if revision not in (None, "main", folder.resolve().name):
            raise ValueError(f"{folder} is perhaps not revision {revision}; give the hub id, or set revision to null")
        return folder
    repo = cache() / f"models--{str(path).replace('/', '--')}"
    ref, snapshots = repo / "refs" / (revision or "main"), repo / "snapshots"
    fetch = f"hf download {path}{f' --revision {revision}' if revision else ''} fetches it"
    with errors_named(snapshots):
        names = sorted(entry.name for entry in os.scandir(snapshots) if entry.is_dir()) if snapshots.is_dir() else []
    if os.path.isfile(ref):
        name = text_of(ref).strip()
        if name not in names:
            raise ValueError(f"{ref} names {name}, which is not in {snapshots}; {fetch}")
        return snapshots / name
    if revision in names or (revision is None and len(names) == 1):
        return snapshots / (revision or names[0])
    if revision is None and names:
        raise ValueError(f"{repo} has no refs/main and several snapshots, {', '.join(names)}; give a path, or {fetch}")
    what = f"no revision {revision} of {path}" if revision else f"no model at {path}: no such directory, no such hub id"
    raise ValueError(f"{what} in {cache()}; {fetch}")


def base_of(folder: Path) -> Path | None:
    """The directory of the base of a PEFT adapter; None for a model that is no adapter."""
    file = folder / "adapter_config.json"
    if not os.path.lexists(file):
        return None
    settings = read_json(file)
    base, revision = settings.take("base_model_name_or_path", str), settings.take("revision", str, None)
    try:
        return locate(base, revision)
    except ValueError as error:
        raise ValueError(f"{file}: its base is not here: {error}") from None


def tokenizer_folder(path: str | Path) -> Path:
    """The directory of a model's tokenizer: its own, or its base's for an adapter that was saved without one.

    If its settings or template differ from the base's, its tokenizer is its own, even if that file is missing.
    """
    folder = locate(path)
    base = None if os.path.lexists(folder / "tokenizer.json") else base_of(folder)
    some = [name for name in ("tokenizer_config.json", "chat_template.jinja") if os.path.lexists(folder / name)]
    same = base and all((base / name).exists() and text_of(folder / name) == text_of(base / name) for name in some)
    return base if same else folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those that its index names, or the single one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if index.exists():
        shards = read_json(index)
        files = [folder / name for name in sorted(set(shards.take("weight_map", dict[str, str]).values()))]
        if not files or any(file.parent != folder for file in files):
            shards.refuse("weight_map", "the names of files beside it")
        if single.exists() and single not in files:
            raise ValueError(f"{folder} holds {single.name}, and {index.name} names other files; remove the older one, "
                             "or fetch the model again")  # fmt: skip
    if absent := [f.name for f in files if not f.is_file()]:
        if (folder / absent[0]).is_symlink():
            check_start(folder / absent[0])
        pickles = "; .bin files are pickles and are not read, convert them" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder} lacks {', '.join(absent)}; fetch the safetensors weights again{pickles}")
    return files
