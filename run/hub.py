"""Where a model's files are: a directory, or a hub id in the local Hugging Face cache. Nothing is fetched."""

import os
from pathlib import Path


def locate(path: str | Path) -> Path:
    """The directory of a model: `path` itself, or the snapshot of a hub id in the local hub cache."""
    if Path(path).is_dir():
        return Path(path)
    home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))
    repo = hub / f"models--{str(path).replace('/', '--')}"
    ref = repo / "refs" / "main"
    if ref.is_file() and (snapshot := repo / "snapshots" / ref.read_text().strip()).is_dir():
        return snapshot
    raise ValueError(f"no model at {path}: no such directory, no such hub id in {hub}; hf download {path} fetches it")
