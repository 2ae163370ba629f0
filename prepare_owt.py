"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt
    python gpt.py --data data/owt

OpenWebText is a tar of 20,610 shards, 40 GB of text; a shard is a tar, compressed with xz, of one
.txt a document. Memory does not hold it, so a first pass writes the text to one file, piece by
piece, and counts characters. Then the vocabulary is known, and a second pass writes the ids.
"""
import codecs, io, json, lzma, multiprocessing, os, random, shlex, shutil, signal, sys, tarfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from gpt import END, UNK, CharTokenizer, Parser, clean


def pieces(file):
    """Yields the text of an open file, a few MB at a time, and END after it unless it is empty."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=False)  # does not part \r from \n
    while data := file.read(2**22):
        yield clean(decoder.decode(data))
    if file.tell() > 0:
        yield clean(decoder.decode(b"", final=True)) + END


def members(file, name):
    """Yields (name, piece of text) of each .txt and (name, bytes) of each .xz in an open tar.
    Nothing is extracted, so no link and no name in it can write anywhere."""
    place = "its start"
    try:
        archive = tarfile.open(fileobj=file, mode="r:")
        while member := archive.next():
            archive.members.clear()  # tarfile would remember all of them
            place = member.name
            if member.isreg() and place.endswith(".xz"):
                yield f"{name}: {place}", archive.extractfile(member).read()
            elif member.isreg() and place.endswith(".txt"):
                for text in pieces(archive.extractfile(member)):
                    yield f"{name}: {place}", text
        # Two blocks of zeros end a tar. tarfile stops at the first, but also at a damaged header or
        # where the file is cut off. An .xz must be read to its end to know that it is whole.
        if file.read(512) != bytes(512):
            raise EOFError("the end is missing")
        while file.read(2**22):
            pass
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise ValueError(f"{name}: damaged in or after {place}: {error}") from None


def shards(files, sample, seed, bar):
    """Yields (name, piece of text or bytes of an .xz); a share of them, chosen by their names."""
    for path in files:
        before = bar.n
        with open(path, "rb") as file:
            if path.name.endswith((".tar", ".tar.xz")):
                found = members(lzma.open(file) if path.suffix == ".xz" else file, str(path))
            elif path.suffix == ".txt":
                found = ((str(path), text) for text in pieces(file))
            else:
                found = [(str(path), file.read())]
            for name, content in found:
                bar.update(before + file.tell() - bar.n)
                if random.Random(f"{seed} {name}").random() < sample:
                    yield name, content


def read(shard):
    """(name, piece of text or bytes of an .xz) -> (UTF-8, the numbers of its characters, and how
    often each occurs). This is what the workers do."""
    name, content = shard
    if isinstance(content, bytes):
        try:
            file = io.BytesIO(lzma.decompress(content))
        except lzma.LZMAError as error:
            raise ValueError(f"{name}: damaged: {error}") from None
        if b"\0" in file.getvalue()[:512]:  # a tar begins with a header, which zeros fill up
            content = "".join(text for _, text in members(file, name))
        else:
            content = "".join(pieces(file))
    counts = np.bincount(np.frombuffer(content.encode("utf-32-le"), "<u4"))
    codes = np.flatnonzero(counts)
    return content.encode(), codes, counts[codes]


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even if it was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()


def write_text(path, files, sample, seed, workers):
    """The first pass: writes all text, as UTF-8; returns how often each character occurs."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    bar = tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=None)
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    with bar, pool, open(path, "wb") as out:
        waiting = shards(files, sample, seed, bar)
        while group := list(islice(waiting, 32 * workers)):  # memory does not hold all of them
            for text, codes, found in pool.map(read, group):
                out.write(text)
                counts[codes] += found
            bar.set_postfix_str(f"{counts[ord(END)]:,} documents, {counts.sum():,} characters")
    return counts


def write_ids(folder, tokenizer, documents, val_fraction):
    """The second pass: writes all ids to train.bin, then moves the last tenth or so to val.bin."""
    with open(folder / "text", encoding="utf-8", newline="") as text:
        with open(folder / "train.bin", "wb") as train:
            while piece := text.read(2**20):
                train.write(tokenizer.encode(piece))
    ids = np.memmap(folder / "train.bin", "<u2", "r")
    cut = int((1 - val_fraction) * len(ids))  # where load_data cuts a single text
    if documents > 1:  # back to the end of a document, or else to that of the first
        while cut > 0 and ids[cut - 1] != tokenizer.end:
            cut -= 1
        cut = cut or int(np.argmax(ids == tokenizer.end)) + 1
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows shortens no file that is mapped
    os.truncate(folder / "train.bin", 2 * cut)


def prepare(files, folder, sample, seed, workers, val_fraction, min_count):
    """Fills an empty folder; returns what its corpus.json says. ValueError names a bad source."""
    counts = write_text(folder / "text", files, sample, seed, workers)
    documents = int(counts[ord(END)])
    if documents == 0:
        raise ValueError(f"no documents in {' '.join(map(str, files))} at --sample {sample}")
    tokenizer = CharTokenizer(map(chr, np.flatnonzero(counts >= min_count)))
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"{tokenizer.vocab_size:,} characters are too many: raise --min_count")
    write_ids(folder, tokenizer, documents, val_fraction)
    (folder / "text").unlink()
    length = int(counts.sum())
    unknown = length - int(counts[tokenizer.id_to_code].sum()) + int(counts[ord(UNK)])
    corpus = dict(documents=documents, characters=length - documents, unknown=unknown,
                  vocabulary=tokenizer.vocab_size, sources=[str(path) for path in files])
    (folder / "vocab.json").write_text(json.dumps(list(tokenizer.chars)), "utf-8")
    (folder / "corpus.json").write_text(json.dumps(corpus, indent=1), "utf-8")
    return corpus


def main(argv=None):
    """Prepares in a temporary folder beside --out, which takes its name when it is complete."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz, .txt, folders")
    parser.add_argument("--out", type=Path, default="data/owt", help="folder to write (data/owt)")
    parser.add_argument("--seed", type=int, default=1337, help="chooses the shards (1337)")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the shards (1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="for validation (0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="rarer characters are UNK (1)")
    limits = {"sample": 1, "workers": 1024, "val_fraction": 0.999, "min_count": 2**62}
    flags = vars(parser.parse_args(argv))
    out, sources, files = flags.pop("out"), flags.pop("sources"), []
    new = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    old = new.with_suffix(".old")
    try:
        for name, most in limits.items():
            if not 0 < flags[name] <= most:
                raise ValueError(f"--{name} must be above 0, at most {most}, not {flags[name]}")
        for source in sources:
            inside = sorted(source.iterdir()) if source.is_dir() else [source]
            files += [path for path in inside if path.suffix in (".tar", ".xz", ".txt")]
            if not source.is_dir() and source not in files:
                raise ValueError(f"{source}: no .tar, .tar.xz, .xz or .txt, nor a folder of them")
        ours = {"train.bin", "val.bin", "vocab.json", "corpus.json"}
        if out.exists() and {path.name for path in out.iterdir()} - ours:
            raise ValueError(f"{out}: holds other files; name a folder of its own with --out")
        new.mkdir(parents=True)
        try:
            corpus = prepare(files, new, **flags)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (ValueError, OSError, BrokenExecutor) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print("{documents:,} documents, {characters:,} characters, {unknown:,} of them unknown, "
          "vocabulary {vocabulary:,}".format(**corpus))
    print(f"train on it: python gpt.py --data {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
