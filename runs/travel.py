"""Takes a model to a machine without a network: packs it in pieces, and puts them together there.

    python runs/travel.py pack MODEL_DIR PIECES [FILE.gguf] [--piece MIB]
    python runs/travel.py unpack PIECES OUT

Nothing is lost. A tensor that was dequantised from FILE.gguf travels as its blocks there, 4.5 to 8.5 bits a weight. The
rest travels as it is. unpack compares the sha256 of each piece, then of each tensor and file. It names the pieces that
are still missing. Only a GGUF file needs the package gguf.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from run import files, reading  # noqa: E402
from run.progress import Parser, command  # noqa: E402

BLOCKS = {  # ggml-common.h: 32 weights in a block of the first two, 256 in one of the others
    "Q5_0": np.dtype([("d", "<f2"), ("high", "u1", 4), ("low", "u1", (1, 16))]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", 32)]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (3, 4)), ("low", "u1", (4, 1, 32))]),
    "Q6_K": np.dtype([("low", "u1", (2, 1, 64)), ("high", "u1", (2, 1, 32)), ("scales", "i1", 16), ("d", "<f2")]),
}


def decode(kind: str, raw: np.ndarray) -> np.ndarray:
    """The weights of quantised blocks, fp32 (N blocks, …), with the products and roundings of ggml-quants.c."""
    blocks = raw.reshape(-1).view(BLOCKS[kind])
    N, d = len(blocks), blocks["d"].astype("<f4")[:, None]
    if kind == "Q8_0":
        return d * blocks["q"]
    low = (blocks["low"] >> np.uint8([[0], [4]]) & 15).reshape(N, -1)  # two weights in a byte
    if kind == "Q5_0":
        high = np.unpackbits(blocks["high"], axis=1, bitorder="little")
        return d * ((low | high << 4) - np.float32(16))
    if kind == "Q6_K":
        high = (blocks["high"] >> np.uint8([[0], [2], [4], [6]]) & 3).reshape(N, -1)
        return (d * blocks["scales"])[..., None] * ((low | high << 4) - np.float32(32)).reshape(N, 16, 16)
    a, b, c = blocks["scales"].swapaxes(0, 1)  # 8 scales and 8 minima, 6 bits each; the last 4 of both are cut in two
    scales, minima = np.hstack([a & 63, c & 15 | a >> 6 << 4]), np.hstack([b & 63, c >> 4 | b >> 6 << 4])
    least = blocks["dmin"].astype("<f4")[:, None] * minima
    return (d * scales)[..., None] * low.reshape(N, 8, 32) - least[..., None]


def digest(data) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(source: Path, out: Path, gguf_file: str | None, size: int) -> None:
    """Writes the folder's files, end to end, as pieces of `size` bytes. ValueError if `out` holds something."""
    quantised, entries, parts = {}, [], []
    if gguf_file:
        import gguf

        for tensor in gguf.GGUFReader(gguf_file).tensors:
            if (kind := tensor.tensor_type.name) in BLOCKS:
                quantised[digest(decode(kind, tensor.data))] = kind, tensor.data
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        data, cuts = np.fromfile(path, "u1"), set()
        if path.suffix == ".safetensors":  # the header's length, the header, the tensors
            start = 8 + int(data[:8].view("<u8")[0])
            header = json.loads(bytes(data[8:start]))
            cuts = {start, *(start + at for tensor in header.values() for at in tensor.get("data_offsets", []))}
        for a, b in itertools.pairwise([0, *sorted(cuts), len(data)]):
            sha = digest(data[a:b])
            kind, part = quantised.get(sha, ("", data[a:b]))
            entries.append((path.name, kind, part.nbytes, sha))
            parts.append(part)
    whole = memoryview(b"".join(parts))
    pieces = {f"{n:02}": whole[at : at + size] for n, at in enumerate(range(0, len(whole), size))}
    with files.whole_folder(out) as folder:
        for name, piece in pieces.items():
            (folder / name).write_bytes(piece)
        shas = {name: digest(piece) for name, piece in pieces.items()}
        files.write_json(folder / "index.json", {"pieces": shas, "entries": entries})
    blocks = sum(kind in BLOCKS for _, kind, *_ in entries)
    print(f"{len(pieces)} pieces and index.json, {len(whole) / 1e6:.1f} MB; {blocks} tensors as quantised blocks")


def unpack(source: Path, out: Path) -> None:
    """Makes the packed folder anew. ValueError if a piece is missing or torn, or if `out` holds something."""
    index, pieces, bad = reading.read_json(source / "index.json"), [], []
    for name, sha in index.take("pieces", dict).items():
        pieces.append((source / name).read_bytes() if (source / name).exists() else b"")
        bad += [f"{name} is {'torn' if pieces[-1] else 'missing'}"] * (digest(pieces[-1]) != sha)
    if bad:
        raise ValueError(f"{source}: of {len(pieces)} pieces {', '.join(bad)}; copy these and try again")
    whole, at = np.frombuffer(b"".join(pieces), "u1"), 0
    with files.whole_folder(out) as folder:
        for name, kind, size, sha in index.take("entries", list):
            part, at = whole[at : at + size], at + size
            part = decode(kind, part) if kind else part
            if digest(part) != sha:
                raise ValueError(f"{name}: a part of it is not what was packed; is {Path(__file__).name} the same?")
            with (folder / name).open("ab") as file:
                file.write(part)
    print(f"{out} is what was packed, to the bit")


@command("travel.py")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="travel.py", description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("gguf", nargs="?", help="with pack: the file that the model was dequantised from")
    parser.add_argument("--piece", metavar="MIB", type=int, default=60, help="size of a piece (default: 60)")
    args = parser.parse_intermixed_args(argv)
    if args.piece < 1 or not args.source.is_dir():
        parser.error(f"{args.source} must be a folder, and --piece at least 1")
    unpack(args.source, args.out) if args.verb == "unpack" else pack(args.source, args.out, args.gguf, args.piece << 20)


if __name__ == "__main__":
    sys.exit(main())
