"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt
    python gpt.py --data data/owt

OpenWebText is a tar of 20,610 shards, 40 GB of text; a shard is a tar, compressed with xz, of one
.txt a document. Memory does not hold it, so a first pass writes files of text, shard by shard, and
counts characters. Then the vocabulary is known, and a second pass turns the text into ids.
"""
import io, json, lzma, multiprocessing, os, random, shlex, signal, sys, tarfile
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import numpy as np
from tqdm import tqdm

from gpt import END, UNK, CharTokenizer, Parser, clean


def contents(name, file, unpack):
    """Yields (name, content) for each part of an open file. A .txt gives pieces of text, then END.
    A .tar or .tar.xz gives what its .txt and .xz give. An .xz gives its bytes, for a worker, and
    there, with unpack, what is in it. ValueError if it is damaged. Nothing is extracted, so no link
    and no name in a tar can write anywhere."""
    place = name
    try:
        if name.endswith(".txt"):
            # A megabyte and the rest of its last line: no character and no \r\n is cut in two.
            while data := file.read(2**20) + file.readline():
                yield name, clean(data.decode("utf-8-sig", "replace"))
            if file.tell() > 0:
                yield name, END
        elif name.endswith((".tar", ".tar.xz")):
            if name.endswith(".xz"):
                file = lzma.open(file)
            archive = tarfile.open(fileobj=file, mode="r:")
            while member := archive.next():
                archive.members.clear()  # tarfile would remember all of them
                place = f"{name}: {member.name}"
                if member.isreg() and place.endswith((".txt", ".xz")):
                    yield from contents(place, archive.extractfile(member), unpack)
            # Two blocks of zeros end a tar, and tarfile has read one. It also stops where a header
            # is damaged.
            if file.read(512) != bytes(512):
                raise EOFError("the end is missing")
            file.read()  # only at its end is an .xz known to be whole
        elif unpack:
            data = lzma.decompress(file.read())
            kind = ".tar" if b"\0" in data[:512] else ".txt"  # zeros fill a tar's first block
            yield from contents(name + kind, io.BytesIO(data), unpack)
        else:
            yield name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{place}: damaged here or after it: {error}") from None


def jobs(files, folder, flags, bar):
    """Yields (file to write, name, content) for each shard, and each piece of a text."""
    number = 0
    for path in files:
        before = bar.n
        with open(path, "rb") as file:
            for name, content in contents(str(path), file, unpack=False):
                bar.update(before + file.tell() - bar.n)  # to where this file has been read
                if random.Random(f"{flags.seed} {name}").random() < flags.sample:
                    yield folder / str(number), name, content
                    number += 1


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even if it was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()


def write_text(job):
    """First pass, in a worker: a job -> (file of text, {character: how often it occurs})."""
    path, name, content = job
    if isinstance(content, bytes):
        content = "".join(text for _, text in contents(name, io.BytesIO(content), unpack=True))
    path.write_bytes(content.encode())
    counts = Counter()
    for start in range(0, len(content), 2**16):  # little at a time, which a processor's cache holds
        piece = content[start : start + 2**16]
        found = np.bincount(np.frombuffer(piece.encode("utf-32-le"), "<u4"))
        for code in np.flatnonzero(found):
            counts[chr(code)] += int(found[code])
    return path, counts


def write_ids(job):
    """Second pass, in a worker: a file of text becomes ids in their place in train.bin."""
    path, start, chars = job
    tokenizer = CharTokenizer(chars)
    with open(path, encoding="utf-8", newline="") as text:
        with open(path.parent / "train.bin", "r+b") as train:
            train.seek(2 * start)  # two bytes an id
            while piece := text.read(2**16):
                train.write(tokenizer.encode(piece))
    path.unlink()


def prepare(files, folder, flags):
    """Fills an empty folder; returns what its corpus.json says. ValueError names a bad source."""
    parts = []  # (file of text, where its ids begin)
    counts = Counter()
    bar = tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=None)
    with bar, ProcessPoolExecutor(flags.workers, initializer=start_worker) as pool:
        waiting = jobs(files, folder, flags, bar)  # a generator: memory does not hold all jobs
        while group := list(islice(waiting, 32 * flags.workers)):
            for path, found in pool.map(write_text, group):
                parts.append((path, counts.total()))
                counts.update(found)
            bar.set_postfix_str(f"{counts[END]:,} documents, {counts.total():,} characters")
        if counts[END] == 0:
            raise ValueError("no documents in " + " ".join(map(str, flags.sources)))
        tokenizer = CharTokenizer(char for char in counts if counts[char] >= flags.min_count)
        if tokenizer.vocab_size > 2**16:
            raise ValueError(f"{tokenizer.vocab_size:,} characters are too many: raise --min_count")
        (folder / "train.bin").touch()
        list(pool.map(write_ids, [(path, start, tokenizer.chars) for path, start in parts]))
    ids = np.memmap(folder / "train.bin", "<u2", "r")
    cut = int((1 - flags.val_fraction) * len(ids))  # where load_data cuts a text
    before = ids[max(0, cut - 2**24) : cut]
    ends = np.flatnonzero(before == tokenizer.end)
    if len(ends) > 0:  # a document ends in the 16 million characters before: better cut there
        cut += int(ends[-1]) + 1 - len(before)
    ids[cut:].tofile(folder / "val.bin")
    del ids, before  # Windows shortens no file that is mapped
    os.truncate(folder / "train.bin", 2 * cut)
    known = sum(counts[char] for char in tokenizer.chars if char != UNK)
    corpus = dict(documents=counts[END], characters=counts.total() - counts[END],
                  unknown=counts.total() - known, vocabulary=tokenizer.vocab_size)
    (folder / "vocab.json").write_text(json.dumps(list(tokenizer.chars)), "utf-8")
    (folder / "corpus.json").write_text(json.dumps(corpus), "utf-8")
    return corpus


def main(argv=None):
    """Prepares in a temporary folder beside --out, which takes its place when it is complete."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz, .txt, folders")
    parser.add_argument("--out", type=Path, default="data/owt", help="folder to write (data/owt)")
    parser.add_argument("--seed", type=int, default=1337, help="chooses the sample (1337)")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the shards (1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="for validation (0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="rarer characters are UNK (1)")
    flags = parser.parse_args(argv)
    files = []
    try:
        if not (0 < flags.sample <= 1 and 0 < flags.val_fraction < 1):
            raise ValueError("--sample and --val_fraction must be above 0 and at most 1")
        for source in flags.sources:
            if source.is_dir():
                files += sorted(p for p in source.iterdir() if p.suffix in (".tar", ".xz", ".txt"))
            else:
                files.append(source)
        ours = {"train.bin", "val.bin", "vocab.json", "corpus.json"}
        if flags.out.exists() and {path.name for path in flags.out.iterdir()} - ours:
            raise ValueError(f"{flags.out}: holds other files; name a folder of its own with --out")
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(".tmp", f"{flags.out.name}.", flags.out.parent) as folder:
            new = Path(folder, "new")
            new.mkdir()
            corpus = prepare(files, new, flags)
            if flags.out.exists():
                flags.out.rename(Path(folder, "old"))
            new.rename(flags.out)
    except (ValueError, OSError, BrokenExecutor) as error:  # broken: a worker was killed
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print(", ".join(f"{number:,} {name}" for name, number in corpus.items()))
    print(f"train on it: python gpt.py --data {shlex.quote(str(flags.out))}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
