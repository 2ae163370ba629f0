"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt

A tar is a file that holds many files, one after the other. OpenWebText is a tar of 20,610 shards;
a shard is a tar again, packed by xz, with a .txt for each document: 40 GB of text in all. Which
characters occur is known only after reading everything, so there are two passes. The first unpacks
the texts, writes them to the disk and counts their characters; the second turns them into ids.
Both are shared by several processes, the workers, since Python runs on one core in each process.
"""
import bz2, io, json, lzma, multiprocessing, os, random, shlex, shutil, signal, tarfile, threading
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
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
    parser.add_argument("--val_fraction", type=float, default=0.1, help="for validation (0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="rarer characters are UNK (1)")
    flags = parser.parse_args(argv)
    try:
        check(flags)
        corpus = prepare_folder(flags)
    except (ValueError, OSError, MemoryError, BrokenExecutor) as error:
        parser.error(str(error) or "out of memory")  # Python's own MemoryError says nothing
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C
    print(f"{corpus['documents']:,} documents, {corpus['characters']:,} characters, "
          f"{corpus['vocabulary']:,} different ones; not read: {as_words(corpus['not_read'])}")
    print(f"{corpus['train']:,} characters to train on, {corpus['val']:,} to validate on")
    print(f"train on it: python gpt.py --data {shlex.quote(str(flags.out))}")


def check(flags):
    """ValueError for a flag that cannot work. Nothing that exists is ever overwritten."""
    if not 0 < flags.sample <= 1:
        raise ValueError(f"--sample must be above 0 and at most 1, not {flags.sample}")
    if not 0 < flags.val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1, not {flags.val_fraction}")
    if flags.min_count < 1:
        raise ValueError(f"--min_count must be at least 1, not {flags.min_count}")
    if os.path.lexists(flags.out):
        raise ValueError(f"{flags.out} exists: delete it, or name another folder with --out")


def prepare_folder(flags):
    """Makes the folder --out, prepares in it, and returns what its corpus.json says. That file is
    written last: gpt.py takes no folder without it, so nobody trains on half a corpus."""
    not_read = Counter()  # {kind: how many}, since nothing is passed over in silence
    files = find_files(flags.sources, not_read)
    flags.out.mkdir(parents=True)
    try:
        return prepare(files, flags, not_read)
    except BaseException:  # whatever it is, also Ctrl-C
        shutil.rmtree(flags.out)
        raise


def find_files(sources, not_read):
    """All files of the sources, including those in folders and their folders."""
    files = []
    for source in sources:
        if not source.is_dir():
            source.stat()  # OSError if it is not there
            files.append(source)
            continue
        for path in gpt.files_in(source):
            if path.is_file():
                files.append(path)
            else:
                not_read["links and other special files"] += 1
    return files


def as_words(counts):
    """{"a": 1, "b": 2} -> "1 a, 2 b"."""
    words = [f"{counts[kind]:,} {kind}" for kind in sorted(counts)]
    return gpt.printable(", ".join(words)) or "nothing"


# -------------------------------- two passes ----------------------------------------------------
def prepare(files, flags, not_read):
    """Fills the new folder. Returns what its corpus.json says. ValueError names a bad source."""
    with ProcessPoolExecutor(initializer=start_worker) as pool:  # a worker for each core
        texts, counts = first_pass(files, flags, pool, not_read)
        documents = counts[gpt.END]  # each is closed by one
        if documents == 0:
            raise ValueError("no documents in these sources, or in this sample of them; not read: "
                             f"{as_words(not_read)}")
        kept = {char for char in counts if counts[char] >= flags.min_count}
        if not kept - {gpt.END, gpt.UNK}:
            raise ValueError(f"no characters: the documents are empty, or rarer than --min_count "
                             f"{flags.min_count}")
        tokenizer = gpt.CharTokenizer(kept)
        second_pass(texts, tokenizer, flags.out, pool)
    train, val = split(flags.out, tokenizer, flags.val_fraction)
    total = train + val
    known = sum(counts[char] for char in tokenizer.chars) - counts[gpt.UNK]
    vocabulary = json.dumps(list(tokenizer.chars)).encode()
    corpus = dict(documents=documents, characters=total - documents, unknown=total - known,
                  vocabulary=tokenizer.vocab_size, train=train, val=val,
                  checksum=zlib.crc32(vocabulary), not_read=not_read)
    (flags.out / "vocab.json").write_bytes(vocabulary)
    (flags.out / "corpus.json").write_text(json.dumps(corpus), "utf-8")
    return corpus


def start_worker():
    """A worker leaves Ctrl-C to its parent, the process that started it, and ends with its parent,
    even if that is killed. A thread, which runs beside the work, does nothing but wait for this."""
    def end_with_parent():
        multiprocessing.parent_process().join()  # waits until it has ended
        os._exit(1)                              # at once, whatever the worker is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def side_by_side(pool, work, jobs):
    """Yields work(*job) for each job, in their order, while the workers do the ones that follow.
    The next job is made only when few are waiting, so that no more than these are in memory."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(work, *job))
        if len(waiting) >= 4 * os.cpu_count():
            yield waiting.popleft().result()  # waits until it is done
    for task in waiting:
        yield task.result()


def progress(files, label):
    """A bar that shows how many bytes of these files are done."""
    size = sum(path.stat().st_size for path in files)
    return tqdm(total=size, unit="B", unit_scale=True, desc=label, dynamic_ncols=True, disable=None)


def first_pass(files, flags, pool, not_read):
    """Writes all texts to the disk. Returns these files, as (path, the number of characters before
    it), and how often each character occurs."""
    texts = []
    counts = Counter()
    characters = 0
    with progress(files, "texts") as bar:
        batches = make_batches(files, flags, bar.update, not_read)
        jobs = ((flags.out / f"{number}.text", batch) for number, batch in enumerate(batches))
        for path, found, passed_over in side_by_side(pool, write_text, jobs):
            texts.append((path, characters))
            characters += sum(found.values())
            counts.update(found)  # a Counter adds
            not_read.update(passed_over)
            bar.set_postfix_str(f"{counts[gpt.END]:,} documents, {characters:,} characters")
    return texts, counts


def make_batches(files, flags, moved, not_read):
    """Yields lists of (name, content), each of about a megabyte: enough work for a worker."""
    batch = []
    size = 0
    for path in files:
        for name, content in read_source(path, moved, not_read):
            # A number from 0 to 1 that follows from the seed and the name, without its folder.
            key = f"{flags.seed} {path.name}" + name.removeprefix(path.as_posix())
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
    """First pass, in a worker: writes the documents of a batch into one file. Returns its path, how
    often each character occurs in it, and what was not read."""
    not_read = Counter()
    counts = np.zeros(0x110000, np.int64)  # for each character of Unicode
    with open(path, "wb", buffering=2**20) as file:
        for name, content in batch:
            for text in read_documents(name, content, not_read):
                file.write(text.encode())
                # Each "A" adds 1 to counts[65]. (counts[codes] += 1 would do so only once.)
                np.add.at(counts, gpt.codes_of(text), 1)
    found = {chr(code): int(counts[code]) for code in np.flatnonzero(counts)}
    return path, found, not_read


def second_pass(texts, tokenizer, folder, pool):
    """Writes train.bin, with the ids of all texts."""
    train = folder / "train.bin"
    train.touch()
    with progress([path for path, _ in texts], "ids") as bar:
        jobs = ((path, start, tokenizer.chars, train) for path, start in texts)
        for size in side_by_side(pool, write_ids, jobs):
            bar.update(size)


def write_ids(path, start, chars, train):
    """Second pass, in a worker: a file of text becomes ids, in their place in train.bin, and is
    deleted. Returns its size in bytes."""
    tokenizer = gpt.CharTokenizer(chars)
    size = path.stat().st_size
    with open(path, encoding="utf-8", newline="") as file, open(train, "r+b") as ids:
        ids.seek(2 * start)  # two bytes for each id; other workers write other places
        while piece := file.read(2**18):
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
    if not 0 < cut < total:
        raise ValueError("too little text to train and to validate")
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows does not shorten a file while an array still maps it
    os.truncate(folder / "train.bin", 2 * cut)
    return cut, total - cut


# -------------------------------- reading -------------------------------------------------------
def read_source(path, moved, not_read):
    """Yields (name, content) of a file on the disk: the pieces of a .txt, the bytes of an .xz, or
    the bytes of each .txt and .xz in a tar. moved(n) is called when n bytes were read."""
    name = path.as_posix()
    kind = kind_of(name)
    if kind == ".txt":  # it may be larger than memory
        for piece in gpt.read_text(path):
            moved(len(piece.encode()))
            yield name, piece
        yield name, gpt.END
    elif kind == ".xz":
        content = path.read_bytes()
        moved(len(content))
        yield name, content
    elif kind == ".tar":
        with open(path, "rb") as file:
            yield from read_tar(name, CallbackIOWrapper(moved, file, "read"), not_read)
    else:
        not_read[kind] += 1


def kind_of(name):
    """What a file is, going by its name: ".txt", ".tar" for a tar of any packing, ".xz" for a
    shard, or another kind, which is not read."""
    name = name.lower().rpartition("/")[2]
    if name.startswith("._"):
        return "._ of macOS"
    if name.endswith((".tar", ".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz")):
        return ".tar"
    return os.path.splitext(name)[1] or "no ending"


def read_tar(name, file, not_read):
    """Yields (name, bytes) for each .txt and .xz in a tar, and in the tars inside it. No file takes
    its name to the disk, so that none can write where it should not. ValueError if the tar is
    damaged, or if anything follows its end."""
    try:
        # "r|" reads from the first byte to the last, and never goes back.
        with tarfile.open(fileobj=unpacked(name, file), mode="r|") as tar:
            for member in tar:
                tar.members.clear()  # it would remember all of them
                inner = f"{name}/{member.name}"
                kind = kind_of(inner)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    not_read["links and other special files"] += 1
                elif kind == ".tar":
                    yield from read_tar(inner, tar.extractfile(member), not_read)
                elif kind in (".txt", ".xz"):
                    yield inner, tar.fileobj.read(member.size)  # tarfile has just read its head
                else:
                    not_read[kind] += 1
            # A tar ends with two blocks of 512 zeros, and any number of zeros may follow. tarfile
            # stops at the first of them, but also where the file is cut off or damaged.
            if tar.fileobj.read(512) != bytes(512):
                raise EOFError("its end is missing")
            while piece := tar.fileobj.read(2**16):
                if piece.strip(b"\0"):
                    raise EOFError("something follows its end; were several tars joined?")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{name}: no tar, or damaged: {error}")


def read_documents(name, content, not_read):
    """In a worker: yields the documents in what read_source yields, each closed by END."""
    if isinstance(content, str):  # a piece of a long text
        yield content
    elif name.lower().endswith(".xz"):
        for inner, data in read_tar(name, io.BytesIO(content), not_read):
            yield from read_documents(inner, data, not_read)
    else:
        encoding = gpt.encoding_of(content)
        text = content.decode(encoding, "replace")  # what cannot be decoded becomes UNK
        if "\0" in text:
            not_read["documents with a NUL"] += 1
            return
        if gpt.UNK in text and text != content.decode(encoding, "ignore"):
            not_read["documents in part (bytes that are not UTF-8)"] += 1
        yield gpt.clean(text) + gpt.END


# -------------------------------- unpacking -----------------------------------------------------
def xz_stream():
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)  # and not the older .lzma, which has no checksum


def gzip_stream():
    return zlib.decompressobj(31)  # 31: with gzip's header


# What unpacks a file, by the ending of its name.
STREAMS = {".xz": xz_stream, ".txz": xz_stream, ".gz": gzip_stream, ".tgz": gzip_stream,
           ".bz2": bz2.BZ2Decompressor, ".tbz2": bz2.BZ2Decompressor, ".tbz": bz2.BZ2Decompressor}


def unpacked(name, file):
    """A file as it is, or what is packed in it, which can be read like a file as well."""
    ending = os.path.splitext(name.lower())[1]
    if ending not in STREAMS:
        return file
    pieces = unpack(file, STREAMS[ending])
    if kind_of(name) == ".xz":
        return io.BytesIO(b"".join(pieces))  # a shard fits in memory, and is read faster from there
    return Pieces(pieces)


def unpack(file, new_stream):
    """Yields what is in a packed file, in pieces. It may consist of several streams, one after the
    other, with zeros between and behind them. Python's own readers may silently drop all but the
    first, so streams are read one by one here. Anything else is damage, and raises an error."""
    stream = new_stream()
    data = file.read(2**16)
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


if __name__ == "__main__":
    gpt.set_up_streams()
    main()
