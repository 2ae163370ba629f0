"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt

OpenWebText is a tar of 20,610 shards, 40 GB of text. A shard is a tar, packed by xz, with a .txt
for each document. The vocabulary is known only when all has been read, hence two passes: the first
writes the texts to the disk and counts characters, the second turns the texts into ids. Several
worker processes share the work.
"""
import io, json, lzma, multiprocessing, os, random, re, shlex, shutil, signal, tarfile, threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper
import gpt


# -------------------------------- reading -------------------------------------------------------
def kind_of(name):
    """What a file is, going by its name: "tar", "xz", "txt", or a word for what is not read."""
    name = name.lower().rpartition("/")[2]
    if name.startswith("._"):
        return "._ of macOS"
    if re.search(r"\.(tar|tar\.\w+|tgz|tbz2?|txz)$", name):
        return "tar"
    ending = os.path.splitext(name)[1]
    if ending in (".xz", ".txt"):
        return ending[1:]
    return ending or "no ending"


def read_tar(name, file, not_read):
    """Yields (name, bytes) for each .txt and .xz in an open tar, and in the tars inside it. Nothing
    is extracted to the disk, so no name can write anywhere. not_read counts, by kind, what is
    passed over. ValueError if the tar is damaged."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:*")  # *: packed by gzip, bzip2, xz or not at all
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
                # To where its bytes begin. (In a packed tar, seek reads on to that place.)
                tar.fileobj.seek(member.offset_data)
                yield inner, tar.fileobj.read(member.size)  # faster than extractfile
            else:
                not_read[kind] += 1
        # A tar ends with two blocks of 512 zeros. tarfile stops at the first of them, and in the
        # same way at some damage. Only if the second one follows, this was the end.
        if tar.fileobj.read(512) != bytes(512):
            raise EOFError("the end is missing")
        # xz and gzip check at their end whether all was whole, so it is read to the end.
        while tar.fileobj.read(2**20):
            pass
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{name}: damaged: {error}")


def read_long_text(path):
    """Yields a text file piece by piece, since it may be larger than memory, and then END.
    ValueError if it is not text."""
    with open(path, "rb") as file:
        encoding = gpt.encoding_of(file.read(2))
    try:
        with open(path, encoding=encoding, newline="") as file:
            while piece := file.read(2**20):
                while piece.endswith("\r"):  # a line end, \r\n, must not be torn apart
                    following = file.read(1)
                    piece += following
                    if not following:
                        break
                if "\0" in piece:
                    raise ValueError("a NUL")
                yield gpt.clean(piece)
    except ValueError as error:  # what Python says of bytes that are wrong is a ValueError too
        raise ValueError(f"{path} is no text: {error}")
    yield gpt.END


def read_source(path, moved, not_read):
    """Yields (name, content) of a file on the disk: pieces of a text, the bytes of a .txt or .xz.
    moved(n) is called for each n bytes read."""
    kind = kind_of(path.name)
    if kind == "txt":
        for piece in read_long_text(path):
            moved(len(piece.encode()))
            yield str(path), piece
    elif kind == "xz":
        yield str(path), path.read_bytes()
        moved(path.stat().st_size)
    elif kind == "tar":
        with open(path, "rb") as file:
            watched = CallbackIOWrapper(moved, file, "read")
            yield from read_tar(str(path), watched, not_read)
    else:
        not_read[kind] += 1


def read_documents(name, content, not_read):
    """Yields the documents in what read_source yields, each closed by END."""
    if isinstance(content, str):
        yield content  # a piece of a long text
    elif kind_of(name) == "txt":
        text = content.decode(gpt.encoding_of(content), "replace")
        if "\0" in text:
            not_read["documents with a NUL"] += 1
            return
        # Bytes that are not UTF-8 have become UNK. Those that were UNK before do not count.
        bad = text.count(gpt.UNK) - content.count(gpt.UNK.encode())
        if bad > 0:
            not_read["bytes that are not UTF-8"] += bad
        yield gpt.clean(text) + gpt.END
    else:
        yield from unpack(name, content, not_read)


def unpack(name, content, not_read):
    """Yields the documents in an .xz, which holds a tar, a text or another .xz."""
    try:
        content = lzma.decompress(content)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{name}: damaged: {error}")
    inner = name[: -len(".xz")]
    if tarfile.is_tarfile(io.BytesIO(content)):
        for member, data in read_tar(inner, io.BytesIO(content), not_read):
            yield from read_documents(member, data, not_read)
    elif kind_of(inner) == "xz":
        yield from unpack(inner, content, not_read)
    elif b"\0" in content and gpt.encoding_of(content) != "utf-16":
        raise ValueError(f"{name}: damaged: it holds neither a tar nor a text")
    else:
        yield from read_documents(f"{inner}.txt", content, not_read)


# -------------------------------- two passes ----------------------------------------------------
def batches(files, flags, moved, not_read):
    """Yields lists of (name, content), each of about a megabyte: enough work for a worker."""
    batch = []
    size = 0
    for path in files:
        for name, content in read_source(path, moved, not_read):
            # A number from 0 to 1 that follows from seed and name: each file has its own.
            draw = random.Random(f"{flags.seed} {name}").random()
            if draw >= flags.sample:
                continue
            batch.append((name, content))
            size += len(content)
            if size >= 2**20:
                yield batch
                batch = []
                size = 0
    yield batch


def write_text(path, batch):
    """First pass, in a worker: writes the documents of a batch into one file. Returns how often
    each character is in it, and what was not read."""
    not_read = Counter()
    documents = []
    for name, content in batch:
        documents.extend(read_documents(name, content, not_read))
    text = "".join(documents)
    path.write_bytes(text.encode())
    return count_characters(text), not_read


def count_characters(text):
    """{character: how often it occurs}. A Counter does that by itself, but ten times slower."""
    counts = Counter()
    for start in range(0, len(text), 2**16):  # little at a time, which a processor's cache holds
        piece = text[start : start + 2**16]
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        found = np.bincount(codes)  # found[65] is how often "A" occurs
        for code in np.flatnonzero(found):
            counts[chr(code)] += int(found[code])
    return counts


def write_ids(path, start, chars, train):
    """Second pass, in a worker: a file of text becomes ids, in their place in train.bin. Returns
    the size of the text in bytes."""
    tokenizer = gpt.CharTokenizer(chars)
    size = path.stat().st_size
    with open(path, encoding="utf-8", newline="") as text, open(train, "r+b") as ids:
        ids.seek(2 * start)  # two bytes for each id; other workers write other places
        while piece := text.read(2**16):
            ids.write(tokenizer.encode(piece))
    path.unlink()
    return size


def first_pass(files, folder, flags, pool):
    """Returns the files of text with their starts, in characters; the counts; what was not read."""
    counts = Counter()
    not_read = Counter()
    texts = []
    waiting = deque()  # (path, future) in order; a future is a result that a worker still owes
    size = sum(path.stat().st_size for path in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="texts", disable=None)

    def take():
        """Waits for the oldest batch, and adds up what it found."""
        path, future = waiting.popleft()
        found, passed_over = future.result()
        texts.append((path, counts.total()))  # it starts where those before it end
        counts.update(found)
        not_read.update(passed_over)
        bar.set_postfix_str(f"{counts[gpt.END]:,} documents, {counts.total():,} characters")

    with bar:
        for number, batch in enumerate(batches(files, flags, bar.update, not_read)):
            path = folder / f"{number}.text"
            waiting.append((path, pool.submit(write_text, path, batch)))
            if len(waiting) > 2 * flags.workers:  # no more than that in memory
                take()
        while waiting:
            take()
    return texts, counts, not_read


def second_pass(texts, tokenizer, folder, pool):
    """Writes train.bin, with the ids of all."""
    train = folder / "train.bin"
    train.touch()
    futures = []
    size = sum(path.stat().st_size for path, _ in texts)
    for path, start in texts:
        futures.append(pool.submit(write_ids, path, start, tokenizer.chars, train))
    with tqdm(total=size, unit="B", unit_scale=True, desc="ids", disable=None) as bar:
        for future in futures:
            bar.update(future.result())


def split(folder, tokenizer, val_fraction):
    """Moves the last part of train.bin to val.bin, back to where a document ends, if one does in
    the 16 million characters before. Returns how many ids both have."""
    ids = np.memmap(folder / "train.bin", "<u2", "r")
    total = len(ids)
    cut = int((1 - val_fraction) * total)
    start = max(0, cut - 2**24)
    ends = np.flatnonzero(ids[start:cut] == tokenizer.end)
    if len(ends) > 0:
        cut = start + int(ends[-1]) + 1  # right behind the last END
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows does not shorten a file while an array looks into it
    os.truncate(folder / "train.bin", 2 * cut)
    return cut, total - cut


def prepare(files, folder, flags):
    """Fills an empty folder; returns what its corpus.json says. ValueError names a bad source."""
    pool = ProcessPoolExecutor(flags.workers, initializer=start_worker)
    try:
        texts, counts, not_read = first_pass(files, folder, flags, pool)
        if counts[gpt.END] == 0:
            raise ValueError(f"no documents in these sources; not read: {as_words(not_read)}")
        kept = [char for char in counts if counts[char] >= flags.min_count]
        if not set(kept) - {gpt.END, gpt.UNK}:
            raise ValueError(f"--min_count {flags.min_count} leaves no characters")
        tokenizer = gpt.CharTokenizer(kept)
        second_pass(texts, tokenizer, folder, pool)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what still waits is not done any more
    train, val = split(folder, tokenizer, flags.val_fraction)
    vocabulary = json.dumps(list(tokenizer.chars)).encode()
    (folder / "vocab.json").write_bytes(vocabulary)
    known = sum(counts[char] for char in tokenizer.chars if char != gpt.UNK)
    corpus = dict(documents=counts[gpt.END], characters=counts.total() - counts[gpt.END],
                  unknown=counts.total() - known, vocabulary=tokenizer.vocab_size,
                  train=train, val=val, checksum=zlib.crc32(vocabulary), not_read=not_read)
    (folder / "corpus.json").write_text(json.dumps(corpus), "utf-8")
    return corpus


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even if it was killed: a
    thread beside its work waits for that."""
    def end_with_parent():
        multiprocessing.parent_process().join()  # waits until it has ended
        os._exit(1)                              # at once, whatever the worker is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


# -------------------------------- the command line ----------------------------------------------
def as_words(counts):
    """{"a": 1, "b": 2} -> "1 a, 2 b"."""
    words = [f"{counts[kind]:,} {kind}" for kind in sorted(counts)]
    return ", ".join(words) or "nothing"


def find_files(sources):
    """All files that are meant, also those in folders, and in theirs."""
    files = []
    for source in sources:
        if source.is_dir():
            files += sorted(path for path in source.rglob("*") if path.is_file())
        else:
            files.append(source)
    return files


def main(argv=None):
    """Prepares in a temporary folder beside --out, which takes its place when it is complete."""
    parser = gpt.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz, .txt, folders")
    parser.add_argument("--out", type=Path, default="data/owt", help="folder to write (data/owt)")
    parser.add_argument("--seed", type=int, default=1337, help="chooses the sample (1337)")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the shards (1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="for validation (0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="rarer characters are UNK (1)")
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGINT, lambda number, frame: parser.exit(130))  # Ctrl-C
    try:
        corpus = replace_folder(flags)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"{corpus['documents']:,} documents, {corpus['characters']:,} characters, "
          f"{corpus['vocabulary']:,} different ones; not read: {as_words(corpus['not_read'])}")
    print(f"train on it: python gpt.py --data {shlex.quote(str(flags.out))}")


def replace_folder(flags):
    """Nobody should find half a corpus, or lose an older one to a preparation that fails. Returns
    what corpus.json says; ValueError for a wrong flag or source."""
    if not 0 < flags.sample <= 1:
        raise ValueError(f"--sample must be above 0 and at most 1, not {flags.sample}")
    if not 0 < flags.val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1, not {flags.val_fraction}")
    if flags.workers < 1 or flags.min_count < 1:
        raise ValueError("--workers and --min_count must be at least 1")
    ours = {"train.bin", "val.bin", "vocab.json", "corpus.json"}
    if flags.out.exists() and set(os.listdir(flags.out)) - ours:
        raise ValueError(f"{flags.out} holds other files; name a folder of its own with --out")
    files = find_files(flags.sources)
    gpt.remove_leftovers(flags.out)
    temporary = Path(f"{flags.out}.{os.getpid()}.tmp")
    try:
        new = temporary / "new"
        new.mkdir(parents=True)
        corpus = prepare(files, new, flags)
        if flags.out.exists():
            flags.out.rename(temporary / "old")
        new.rename(flags.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return corpus


if __name__ == "__main__":
    gpt.open_streams()
    main()
