"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt

OpenWebText is a tar of 20,610 shards, 40 GB of text. A shard is a tar, packed by xz, with a .txt
for each document. The vocabulary is only known after reading everything, so there are two passes:
the first writes the texts to the disk and counts characters, the second turns the texts into ids.
Several worker processes share the work.
"""
import bz2, functools, io, itertools, json, lzma, multiprocessing, os, random, re, shlex, shutil
import signal, tarfile, threading, zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper
import gpt


# -------------------------------- the command line ----------------------------------------------
def main(argv=None):
    """Reads the flags, prepares, and says what was prepared."""
    parser = gpt.Parser(description="Turn archives of texts into a folder that gpt.py trains on.",
                        allow_abbrev=False)
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz, .txt, folders")
    parser.add_argument("--out", type=Path, default="data/owt", help="folder to write (data/owt)")
    parser.add_argument("--seed", type=int, default=1337, help="chooses the sample (1337)")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the shards (1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="for validation (0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="rarer characters are UNK (1)")
    flags = parser.parse_args(argv)
    try:
        check(flags)
        corpus = prepare_folder(flags)
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C
    print(f"{corpus['documents']:,} documents, {corpus['characters']:,} characters, "
          f"{corpus['vocabulary']:,} different ones; not read: {as_words(corpus['not_read'])}")
    print(f"train on it: python gpt.py --data {shlex.quote(str(flags.out))}")


def check(flags):
    """ValueError for a flag that cannot work. An older corpus is never overwritten."""
    if not 0 < flags.sample <= 1:
        raise ValueError(f"--sample must be above 0 and at most 1, not {flags.sample}")
    if not 0 < flags.val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1, not {flags.val_fraction}")
    if flags.workers < 1 or flags.min_count < 1:
        raise ValueError("--workers and --min_count must be at least 1")
    if os.path.lexists(flags.out):
        raise ValueError(f"{flags.out} exists: delete it, or name another folder with --out")


def prepare_folder(flags):
    """Prepares in a temporary folder beside --out, and renames it when it is complete, so that
    nobody finds half a corpus. Returns what corpus.json says; ValueError for a bad source."""
    not_read = Counter()
    files = find_files(flags.sources, not_read)
    temporary = Path(f"{flags.out}.tmp")
    if temporary.exists():
        raise ValueError(f"{temporary} exists: another preparation is running or was killed; if "
                         "none is running, delete it")
    temporary.mkdir(parents=True)
    try:
        corpus = prepare(files, temporary, flags, not_read)
        temporary.rename(flags.out)
    except BaseException:  # whatever it is, also Ctrl-C
        shutil.rmtree(temporary)
        raise
    return corpus


def find_files(sources, not_read):
    """All files of the sources, including those in folders and their folders."""
    files = []
    for source in sources:
        if not source.is_dir():
            files.append(source)
            continue
        for path in sorted(source.rglob("*")):  # it does not follow links to folders
            if path.is_file():
                files.append(path)
            elif path.is_symlink() or not path.is_dir():
                not_read["links and devices"] += 1
    return files


def as_words(counts):
    """{"a": 1, "b": 2} -> "1 a, 2 b"."""
    words = [f"{counts[kind]:,} {kind}" for kind in sorted(counts)]
    return gpt.printable(", ".join(words)) or "nothing"


# -------------------------------- two passes ----------------------------------------------------
def prepare(files, folder, flags, not_read):
    """Fills an empty folder; returns what its corpus.json says. ValueError names a bad source."""
    with ProcessPoolExecutor(flags.workers, initializer=start_worker) as pool:
        texts, counts = first_pass(files, folder, flags, pool, not_read)
        total = int(counts.sum())
        documents = int(counts[ord(gpt.END)])
        if documents == 0:
            raise ValueError(f"no documents in these sources; not read: {as_words(not_read)}")
        kept = [chr(code) for code in np.flatnonzero(counts >= flags.min_count)]
        if not set(kept) - {gpt.END, gpt.UNK}:
            raise ValueError(f"--min_count {flags.min_count} leaves no characters")
        tokenizer = gpt.CharTokenizer(kept)
        second_pass(texts, tokenizer, folder, pool)
    train, val = split(folder, tokenizer, flags.val_fraction)
    vocabulary = json.dumps(list(tokenizer.chars)).encode()
    (folder / "vocab.json").write_bytes(vocabulary)
    known = int(counts[gpt.codes_of(tokenizer.chars)].sum() - counts[ord(gpt.UNK)])
    corpus = dict(documents=documents, characters=total - documents, unknown=total - known,
                  vocabulary=tokenizer.vocab_size, train=train, val=val,
                  checksum=zlib.crc32(vocabulary), not_read=not_read)
    (folder / "corpus.json").write_text(json.dumps(corpus), "utf-8")
    return corpus


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends with it, even if the parent was killed: a
    thread beside its work waits for that."""
    def end_with_parent():
        multiprocessing.parent_process().join()  # waits until it has ended
        os._exit(1)                              # at once, whatever the worker is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def first_pass(files, folder, flags, pool, not_read):
    """Writes all texts to the disk. Returns these files, as (path, the number of characters before
    it), and how often each character of Unicode occurs (an array)."""
    texts = []
    counts = np.zeros(0x110000, np.int64)
    size = sum(path.stat().st_size for path in files)
    with progress(size, "texts") as bar:
        batches = make_batches(files, flags, bar.update, not_read)
        for group in in_groups(batches):
            paths = [folder / f"{len(texts) + number}.text" for number in range(len(group))]
            for path, result in zip(paths, pool.map(write_text, paths, group)):
                codes, found, passed_over = result
                texts.append((path, counts.sum()))
                counts[codes] += found
                not_read.update(passed_over)
            bar.set_postfix_str(f"{counts[ord(gpt.END)]:,} documents, {counts.sum():,} characters")
    return texts, counts


def progress(size, label):
    return tqdm(total=size, unit="B", unit_scale=True, desc=label, dynamic_ncols=True, disable=None)


def in_groups(items):
    """Yields lists of items. The workers get one of them after the other, so that no more than that
    is in memory or left to do when something goes wrong."""
    items = iter(items)
    while group := list(itertools.islice(items, 8 * os.cpu_count())):
        yield group


def make_batches(files, flags, moved, not_read):
    """Yields lists of (name, content), each of about a megabyte: enough work for a worker."""
    batch = []
    size = 0
    for path in files:
        for name, content in read_source(path, moved, not_read):
            # A number from 0 to 1 that follows from seed and name, but not from the folder.
            key = f"{flags.seed} {name.replace(str(path), path.name, 1)}"
            if random.Random(key.encode("utf-8", "surrogatepass")).random() >= flags.sample:
                continue
            batch.append((name, content))
            size += len(content)
            if size >= 2**20:
                yield batch
                batch = []
                size = 0
    if batch:
        yield batch


def write_text(path, batch):
    """First pass, in a worker: writes the documents of a batch into one file. Returns which
    characters occur in it, as their numbers in Unicode, how often each, and what was not read."""
    not_read = Counter()
    counts = np.zeros(0x110000, np.int64)
    with open(path, "wb", buffering=2**20) as file:
        for name, content in batch:
            for text in read_documents(name, content, not_read):
                file.write(text.encode())
                found = np.bincount(gpt.codes_of(text))  # found[65] is how often "A" occurs
                counts[: len(found)] += found
    codes = np.flatnonzero(counts)
    return codes, counts[codes], not_read


def second_pass(texts, tokenizer, folder, pool):
    """Writes train.bin, with the ids of all texts."""
    train = folder / "train.bin"
    train.touch()
    write = functools.partial(write_ids, tokenizer.chars, train)
    size = sum(path.stat().st_size for path, _ in texts)
    with progress(size, "ids") as bar:
        for group in in_groups(texts):
            for written in pool.map(write, group):
                bar.update(written)


def write_ids(chars, train, text):
    """Second pass, in a worker: a file of text becomes ids, in their place in train.bin, and is
    deleted. Returns its size in bytes."""
    path, start = text
    tokenizer = gpt.CharTokenizer(chars)
    size = path.stat().st_size
    with open(path, encoding="utf-8", newline="") as file, open(train, "r+b") as ids:
        ids.seek(2 * start)  # two bytes for each id; other workers write other places
        while piece := file.read(2**16):
            ids.write(tokenizer.encode(piece))
    path.unlink()
    return size


def split(folder, tokenizer, val_fraction):
    """Moves the last part of train.bin to val.bin. It begins after the last END before the place
    for the cut, if there is one within 16 million characters. Returns the lengths of both."""
    ids = np.memmap(folder / "train.bin", np.uint16, "r")
    total = len(ids)
    cut = int((1 - val_fraction) * total)
    start = max(0, cut - 2**24)
    ends = np.flatnonzero(ids[start:cut] == tokenizer.end)
    if len(ends) > 0:
        cut = start + int(ends[-1]) + 1  # right behind the last END
    if cut == 0:
        raise ValueError("too little text to train and to validate")
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows does not shorten a file while an array still maps it
    os.truncate(folder / "train.bin", 2 * cut)
    return cut, total - cut


# -------------------------------- reading -------------------------------------------------------
def read_source(path, moved, not_read):
    """Yields (name, content) of a file on the disk: the pieces of a .txt, the bytes of an .xz, or
    the bytes of each .txt and .xz in a tar. moved(n) is called when n bytes were read."""
    kind = kind_of(path.name)
    if kind == "txt":  # it may be larger than memory
        for piece in gpt.read_text(path):
            moved(len(piece.encode()))
            yield str(path), piece
        yield str(path), gpt.END
    elif kind in ("xz", "tar"):
        with open(path, "rb") as file:
            watched = CallbackIOWrapper(moved, file, "read")
            if kind == "xz":
                yield str(path), watched.read()
            else:
                yield from read_tar(str(path), watched, not_read)
    else:
        not_read[kind] += 1


TARS = (".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tbz", ".tbz2", ".txz")


def kind_of(name):
    """What a file is, going by its name: "txt", "tar", "xz", or a word for what is not read."""
    name = name.lower().rpartition("/")[2]
    if name.startswith("._"):
        return "._ of macOS"
    if name.endswith(".txt"):
        return "txt"
    if name.endswith(TARS):
        return "tar"
    if name.endswith(".xz"):
        return "xz"
    return os.path.splitext(name)[1] or "no ending"


def read_tar(name, file, not_read):
    """Yields (name, bytes) for each .txt and .xz in a tar, and in the tars inside it. Nothing is
    extracted to the disk, so no name can write anywhere. not_read counts, by kind, what is passed
    over. ValueError if the tar is damaged, or if anything follows its end."""
    try:
        with open_tar(file) as tar:
            while member := tar.next():
                tar.members.clear()  # it would remember all of them
                inner = f"{name}: {member.name}"
                kind = kind_of(member.name)
                if member.isdir():
                    continue
                if not member.isreg():
                    not_read["links and devices"] += 1
                elif kind == "tar":
                    yield from read_tar(inner, tar.extractfile(member), not_read)
                elif kind in ("xz", "txt"):
                    yield inner, tar.extractfile(member).read()
                else:
                    not_read[kind] += 1
            # A tar ends with two blocks of 512 zeros, and any number of zeros may follow. tarfile
            # stops at the first of them, but also where the file is cut off or damaged.
            if tar.fileobj.read(512) != bytes(512):
                raise EOFError("its end is missing")
            while piece := tar.fileobj.read(2**16):
                if piece.strip(b"\0"):
                    raise EOFError("something follows its end; were several tars joined?")
    except (tarfile.TarError, *DAMAGE) as error:
        raise ValueError(f"{name}: damaged: {error}")


def open_tar(file):
    """A tar that is in memory, as those in an .xz are, is faster read as it is."""
    if isinstance(file, io.BytesIO) and packing_of(file.getvalue()) is None:
        return tarfile.open(fileobj=file, mode="r:")
    # "r|" reads from the first byte to the last, and never goes back.
    return tarfile.open(fileobj=Pieces(unpack(file)), mode="r|", bufsize=2**16)


def xz_stream():
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)  # and not the older .lzma, which has no checksum


def gzip_stream():
    return zlib.decompressobj(31)  # 31: with gzip's header


# How a packed file begins, and what unpacks one stream of it. (A tar begins with the name of a
# file, which may well be BZhang.txt.)
PACKINGS = {rb"\xfd7zXZ\0": xz_stream, rb"BZh[1-9]1AY&SY": bz2.BZ2Decompressor,
            rb"\x1f\x8b\x08": gzip_stream}
DAMAGE = (lzma.LZMAError, zlib.error, EOFError, OSError)  # what they raise if it is damaged


def packing_of(data):
    """What unpacks a file that begins with these bytes; None if it is not packed."""
    for start in PACKINGS:
        if re.match(start, data):
            return PACKINGS[start]
    return None


def unpack(file, new_stream=None):
    """Yields what is in a file that was packed by xz, bzip2 or gzip, in pieces. A packed file may
    be several streams, one after the other, with zeros between and behind them. Python's own
    readers handle this only in part, and may silently drop the rest, so streams are read one by one
    here. Raises one of DAMAGE if there is anything else.
    new_stream: for a file that begins like none of these; without it, it is yielded as it is."""
    data = file.read(2**16)
    new_stream = packing_of(data) or new_stream
    if new_stream is None:
        while data:
            yield data
            data = file.read(2**16)
        return
    stream = new_stream()
    while data:
        if not stream.eof:
            yield stream.decompress(data)
            data = stream.unused_data  # what follows the stream, once it has ended
        else:
            data = data.lstrip(b"\0")
            if data:
                stream = new_stream()
        if not data:
            data = file.read(2**16)
    if not stream.eof:
        raise EOFError("its end is missing")


class Pieces:
    """Pieces of bytes that are read like a file. As with a pipe, less may come than was asked for,
    and nothing only at the end."""

    def __init__(self, pieces):
        self.pieces = filter(None, pieces)  # without the empty ones
        self.piece = io.BytesIO()

    def read(self, size):
        found = self.piece.read(size)
        if not found:
            self.piece = io.BytesIO(next(self.pieces, b""))
            found = self.piece.read(size)
        return found


def read_documents(name, content, not_read):
    """Yields the documents in what read_source yields, each closed by END. An .xz holds a tar, a
    text or another .xz. ValueError if it is damaged."""
    if isinstance(content, str):  # a piece of a long text
        yield content
        return
    packed = kind_of(name) == "xz"
    inner = name
    try:
        while kind_of(inner) == "xz":
            content = b"".join(unpack(io.BytesIO(content), xz_stream))
            inner = inner[: -len(".xz")]
        is_tar = packed and tarfile.is_tarfile(io.BytesIO(content))
    except DAMAGE as error:
        raise ValueError(f"{name}: damaged: {error}")
    if is_tar:
        for member, data in read_tar(name, io.BytesIO(content), not_read):
            yield from read_documents(member, data, not_read)
        return
    encoding = gpt.encoding_of(content)
    if packed and b"\0" in content and encoding != "utf-16":
        raise ValueError(f"{name}: damaged: it holds neither a tar nor a text")
    text = content.decode(encoding, "replace")
    if "\0" in text:
        not_read["documents with a NUL"] += 1
        return
    bad = text.count(gpt.UNK)  # what could not be decoded has become UNK
    if bad > 0:
        bad -= content.decode(encoding, "ignore").count(gpt.UNK)  # those that were UNK before
    if bad > 0:
        not_read["bytes that are not UTF-8"] += bad
    yield gpt.clean(text) + gpt.END


if __name__ == "__main__":
    gpt.set_up_streams()
    main()
