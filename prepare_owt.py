"""Turns OpenWebText, or any archive of texts, into the folder of ids that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt

OpenWebText is a tar of 20,610 shards, 40 GB of text; a shard is a tar, packed by xz, with a .txt
for each document. A first pass writes text and counts characters; a second makes ids of the text.
"""
import io, json, lzma, multiprocessing, os, random, shlex, signal, tarfile, tempfile, threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice, repeat
from pathlib import Path
import numpy as np
from tqdm import tqdm, utils
from gpt import END, UNK, CharTokenizer, Parser, clean


def contents(name, file, unpack=False):
    """Yields (name, content) for each part of an open file: for a .txt its text and END, for a tar
    what is in it, for an .xz its bytes or, with unpack, what is in them. ValueError if damaged."""
    try:
        if name.endswith(".txt"):
            while data := file.read(2**20) + file.readline():  # whole lines, about 1 MB
                yield name, clean(data.decode("utf-8-sig", "replace"))
            if file.tell() > 0:
                yield name, END
        elif name.endswith((".tar", ".tar.xz")):
            tar = tarfile.open(fileobj=file, mode="r:" + name.rpartition(".")[2])  # r:tar or r:xz
            while member := tar.next():  # nothing is extracted, so no name can write anywhere
                tar.members.clear()  # it would remember all of them
                if member.isreg() and member.name.endswith((".txt", ".xz")):  # a plain file
                    yield from contents(f"{name}: {member.name}", tar.extractfile(member), unpack)
            if tar.fileobj.read(512) != bytes(512):  # a tar ends with two; next has read one
                raise EOFError("the end is missing")
            tar.fileobj.read()  # only at its end is an .xz known to be whole
        elif unpack:
            data = lzma.decompress(file.read())
            kind = ".tar" if b"\0" in data[:512] else ".txt"  # zeros fill a tar's first block
            yield from contents(name + kind, io.BytesIO(data))
        elif name.endswith(".xz"):
            yield name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{name}: damaged: {error}") from None


def write_text(number, part, folder):
    """First pass, in a worker: writes a part's text; returns how often each character is in it."""
    name, text = part
    if isinstance(text, bytes):  # an .xz: workers share the work of unpacking
        text = "".join(piece for _, piece in contents(name, io.BytesIO(text), unpack=True))
    (folder / str(number)).write_bytes(text.encode())
    counts = Counter()
    for start in range(0, len(text), 2**16):  # little at a time, which a processor's cache holds
        found = np.bincount(np.frombuffer(text[start : start + 2**16].encode("utf-32-le"), "<u4"))
        for code in np.flatnonzero(found):  # found[65] is how often "A" occurs
            counts[chr(code)] += int(found[code])
    return counts


def write_ids(number, start, folder, chars):
    """Second pass, in a worker: a file of text becomes ids, in their place in train.bin."""
    tokenizer = CharTokenizer(chars)
    path = folder / str(number)
    with open(path, encoding="utf-8", newline="") as text, open(folder / "train.bin", "r+b") as ids:
        ids.seek(2 * start)  # two bytes an id; other workers write other places
        while piece := text.read(2**16):
            ids.write(tokenizer.encode(piece))
    path.unlink()


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even if it was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()  # waits until it is gone
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare(files, folder, flags):
    """Fills an empty folder; returns what its corpus.json says. ValueError names a bad source."""
    counts = Counter()  # {character: how often it occurs}
    starts = []  # of each file of text, in characters
    bar = tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, disable=None)
    parts = (part for path in files for part in contents(  # each read moves the bar
        str(path), utils.CallbackIOWrapper(bar.update, path.open("rb"), "read"))
        if random.Random(f"{flags.seed} {part[0]}").random() < flags.sample)
    with bar, ProcessPoolExecutor(flags.workers, initializer=start_worker) as pool:
        while group := list(islice(parts, 32 * flags.workers)):  # the next
            for found in pool.map(write_text, count(len(starts)), group, repeat(folder)):
                starts.append(counts.total())
                counts.update(found)
            bar.set_postfix_str(f"{counts[END]:,} documents, {counts.total():,} characters")
        if counts[END] == 0:
            raise ValueError("no documents in " + " ".join(map(str, flags.sources)))
        tokenizer = CharTokenizer(char for char in counts if counts[char] >= flags.min_count)
        if tokenizer.vocab_size > 2**16:
            raise ValueError(f"{tokenizer.vocab_size:,} characters are too many: raise --min_count")
        (folder / "train.bin").touch()
        list(pool.map(write_ids, count(), starts, repeat(folder), repeat(tokenizer.chars)))
    ids = np.memmap(folder / "train.bin", "<u2", "r")
    cut = int((1 - flags.val_fraction) * len(ids))  # where load_data cuts a text
    is_end = ids[max(0, cut - 2**24) : cut] == tokenizer.end  # in the 16 million ids before
    cut -= int(np.argmax(is_end[::-1]))  # back to the last True, if there is one: else argmax is 0
    ids[cut:].tofile(folder / "val.bin")
    del ids  # Windows shortens no file that is mapped
    os.truncate(folder / "train.bin", 2 * cut)
    (folder / "vocab.json").write_text(json.dumps(list(tokenizer.chars)), "utf-8")
    known = sum(counts[char] for char in tokenizer.chars if char != UNK)
    corpus = dict(documents=counts[END], characters=counts.total() - counts[END],
                  unknown=counts.total() - known, vocabulary=tokenizer.vocab_size)
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
    signal.signal(signal.SIGINT, lambda number, frame: parser.exit(130))  # Ctrl-C
    try:
        if not (0 < flags.sample <= 1 and 0 < flags.val_fraction < 1):
            raise ValueError("--sample and --val_fraction must be above 0 and at most 1")
        files = [path for source in flags.sources  # what is in a folder, or the source itself
                 for path in sorted(source.glob("*.*")) or [source]]
        ours = {"train.bin", "val.bin", "vocab.json", "corpus.json"}
        if flags.out.exists() and {path.name for path in flags.out.iterdir()} - ours:
            raise ValueError(f"{flags.out}: holds other files; name a folder of its own with --out")
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", f"{flags.out.name}.", flags.out.parent) as folder:
            new = Path(folder, "new")
            new.mkdir()
            corpus = prepare(files, new, flags)
            if flags.out.exists():
                flags.out.rename(Path(folder, "old"))
            new.rename(flags.out)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"{corpus}\ntrain on it: python gpt.py --data {shlex.quote(str(flags.out))}")


if __name__ == "__main__":
    main()
