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


def contents(name, file):
    """Yields (name, content) of an open .txt: its text in pieces, then END; of an .xz: its bytes;
    of a .tar or .tar.xz: what is in its .txt and .xz. ValueError if it is damaged. Nothing is
    extracted, so no link and no name in a tar can write anywhere."""
    if name.endswith(".txt"):
        text = io.TextIOWrapper(file, "utf-8-sig", "replace", newline="")
        while piece := text.read(2**20):
            if piece.endswith("\r"):  # clean must see \r\n as a whole
                piece += text.read(1)
            yield name, clean(piece)
        if file.tell() > 0:
            yield name, END
    elif not name.endswith((".tar", ".tar.xz")):
        yield name, file.read()
    else:
        place = "its start"
        try:
            tar = lzma.open(file) if name.endswith(".xz") else file
            archive = tarfile.open(fileobj=tar, mode="r:")
            while member := archive.next():
                archive.members.clear()  # tarfile would remember all of them
                place = member.name
                if member.isreg() and place.endswith((".txt", ".xz")):
                    yield from contents(f"{name}: {place}", archive.extractfile(member))
            # Two blocks of zeros end a tar, but tarfile also stops where a header is damaged.
            if tar.read(512) != bytes(512):
                raise EOFError("the end is missing")
            tar.read()  # only at its end is an .xz known to be whole
        except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
            raise ValueError(f"{name}: damaged in or after {place}: {error}") from None


def read(name, content):
    """What contents yields -> str: itself if it is text, all texts in it if it is an .xz."""
    if name.endswith(".txt"):
        return content
    try:
        content = lzma.decompress(content)
    except lzma.LZMAError as error:
        raise ValueError(f"{name}: damaged: {error}") from None
    name += ".tar" if b"\0" in content[:512] else ".txt"  # zeros fill the first block of a tar
    return "".join(read(*inside) for inside in contents(name, io.BytesIO(content)))


def jobs(files, folder, flags, bar):
    """Yields (file to write, [(name, content), ...] to write there): a shard, or many texts."""
    job = []
    size = 0
    number = 0
    for path in files:
        before = bar.n
        with open(path, "rb") as file:
            for name, content in contents(str(path), file):
                bar.update(before + file.tell() - bar.n)
                if random.Random(f"{flags.seed} {name}").random() < flags.sample:
                    job.append((name, content))
                    size += len(content)
                if size > 2**18:
                    yield folder / str(number), job
                    job = []
                    size = 0
                    number += 1
    yield folder / str(number), job


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even if it was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()


def write_text(job):
    """First pass, in a worker: a job -> (file of text, {character: how often it occurs})."""
    path, found = job
    text = "".join(read(*content) for content in found)
    path.write_bytes(text.encode())
    counts = Counter()
    for start in range(0, len(text), 2**16):  # little at a time, which a processor's cache holds
        codes = np.frombuffer(text[start : start + 2**16].encode("utf-32-le"), "<u4")
        here = np.bincount(codes)
        for code in np.flatnonzero(here):
            counts[chr(code)] += int(here[code])
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
        waiting = jobs(files, folder, flags, bar)
        while group := list(islice(waiting, 32 * flags.workers)):  # memory does not hold all jobs
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
    cut = int((1 - flags.val_fraction) * len(ids))  # where load_data cuts a single text
    if counts[END] > 1:  # back to the end of a document, or else to that of the first
        while cut > 0 and ids[cut - 1] != tokenizer.end:
            cut -= 1
        cut = cut or int(np.argmax(ids == tokenizer.end)) + 1
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows shortens no file that is mapped
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
        if flags.workers < 1 or flags.min_count < 1:
            raise ValueError("--workers and --min_count must be at least 1")
        for source in flags.sources:
            found = sorted(source.iterdir()) if source.is_dir() else [source]
            files += [path for path in found if path.suffix in (".tar", ".xz", ".txt")]
            if not source.is_dir() and source not in files:
                raise ValueError(f"{source}: no .tar, .tar.xz, .xz or .txt, nor a folder of them")
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
