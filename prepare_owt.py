"""Turns OpenWebText, or any archive of texts, into the memory-mapped folder that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt
    python prepare_owt.py urlsf_subset*.tar --out data/owt --sample 0.01
    python gpt.py --data data/owt

The real corpus is 8 million documents, 40 GB, in an archive of 20,610 shards; a shard is an xz-compressed tar (sic) of
one .txt file a document. It is larger than memory, so it streams: threads decompress a shard each (lzma and numpy let
the others run meanwhile), and its characters go to one file as 16-bit code points. When all of them are known, they
are renumbered in place and the file is cut in two. Nothing is unpacked to disk, and no name in an archive becomes a
file's.
"""
import argparse, io, json, lzma, os, random, re, shlex, shutil, sys, zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

END, UNK = "\x03", "\ufffd"  # as in gpt.py, which is not imported: torch would take longer to load than a small corpus
XZ = b"\xfd7zXZ\x00"         # how an xz file begins
HOLE = 0xD800                # a code point that is no character


def members(file, name):
    """Yields (name, bytes) of each regular file in an open tar, in order. ValueError if it is damaged or cut off."""
    long = b""
    try:
        while (block := file.read(512)) != bytes(512):  # a tar ends with zeros
            # What tarfile does, some five times faster: a header is 512 bytes with a name, a size and a sum in octal.
            size, total = (int(block[i:j].strip(b" \0") or b"0", 8) for i, j in ((124, 136), (148, 156)))
            found = zlib.adler32(block[:148] + b" " * 8 + block[156:], 0) % 2**16  # this half of it is the plain sum
            if total != found or not 0 <= size < 2**30:
                raise EOFError("not the header of a file below 1 GiB")
            kind, data = block[156:157], file.read(-(-size // 512) * 512)[:size]
            if len(data) < size:
                raise EOFError("it ends inside a file")
            if kind in b"Lx":  # a name of more than 100 bytes comes before its file, as GNU or as POSIX writes it
                long = data.rstrip(b"\0") if kind == b"L" else b"".join(re.findall(rb"\d path=(.*)\n", data))
            elif kind in b"0\0":  # folders, links and devices hold no text
                yield (long or block[:100].partition(b"\0")[0]).decode("utf-8", "replace"), data
            long = long if kind in b"Lx" else b""
        while file.read(2**20):  # an .xz knows only at its very end whether it is whole
            pass
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise ValueError(f"{name}: corrupt: {error}") from None


def decode(documents):
    """[bytes] -> [str]: UTF-8, \\n at line ends, closed by END; what is not UTF-8, and an END inside, become UNK."""
    texts = (d.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").replace(END, UNK) for d in documents)
    # Looking for \r first is four times faster.
    return [(text.replace("\r\n", "\n") if "\r" in text else text) + END for text in texts if text]


def shards(path):
    """Yields (name, bytes of an .xz or decoded str, bytes read so far) for each shard in the file at path."""
    if path.name.endswith((".tar", ".tar.xz")):
        with open(path, "rb") as raw, lzma.open(raw) if path.suffix == ".xz" else raw as file:
            for name, data in members(file, path):
                if data.startswith(XZ) or name.endswith(".txt"):
                    yield f"{path}: {name}", data if data.startswith(XZ) else "".join(decode([data])), raw.tell()
    elif path.suffix == ".xz":
        yield str(path), path.read_bytes(), path.stat().st_size
    elif path.suffix == ".txt":
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            while text := file.read(2**22):
                text += file.read(1) if text.endswith("\r") else ""  # do not part \r from \n
                yield str(path), text.replace("\r\n", "\n").replace(END, UNK), file.buffer.tell()
        yield str(path), END if path.stat().st_size else "", path.stat().st_size
    else:
        raise ValueError(f"{path}: not a .tar, .tar.xz, .xz or .txt file, nor a folder of them")


def encode(name, data):
    """A shard -> (ids, 1-D uint16; how often each of the 65,536 ids occurs; stand-ins; what they stand for).

    An id is a character's code point, which is what UTF-16 stores. For one past 16 bits (an emoji, say) stands an id
    that is no character of this shard.
    """
    texts = [data]
    if isinstance(data, bytes):
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ValueError(f"{name}: corrupt: {error}") from None
        is_tar = data[257:262] in (b"ustar", bytes(5))
        texts = decode([d for _, d in members(io.BytesIO(data), name)] if is_tar else [data])
    pieces, far = [], [np.zeros(0, "<u4")]
    for text in (text[i : i + 2**16] for text in texts for i in range(0, len(text), 2**16)):
        pieces.append(text.encode("utf-16-le"))
        if len(pieces[-1]) > 2 * len(text):  # some character took two places: leave a hole in one instead
            points = np.frombuffer(text.encode("utf-32-le"), "<u4")
            pieces[-1] = np.where(points < 2**16, points, HOLE).astype("<u2").tobytes()
            far.append(points[points >= 2**16])
    ids, counts = np.frombuffer(bytearray().join(pieces), "<u2"), np.zeros(2**16, np.int64)
    for i in range(0, len(ids), 2**18):  # so much at a time as the CPU's cache holds
        counts += np.bincount(ids[i : i + 2**18].astype(np.intp), minlength=2**16)
    counts[HOLE] = 0
    codes, which, times = np.unique(np.concatenate(far), return_inverse=True, return_counts=True)
    stand_ins = np.flatnonzero(counts == 0)[::-1][: len(codes)].copy()  # a view would keep all of it in memory
    if len(stand_ins) < len(codes):
        raise ValueError(f"{name}: more than {2**16:,} different characters in one shard")
    counts[stand_ins] = times
    if len(codes):
        ids[ids == HOLE] = stand_ins[which]
    return ids, counts, stand_ins, codes


def renumber(ids, final, stand_ins, codes):
    """Gives a shard's ids their final numbers, in place."""
    table = final[: 2**16].copy()
    table[stand_ins] = final[codes]
    for i in range(0, len(ids), 2**18):
        ids[i : i + 2**18] = table.take(ids[i : i + 2**18], mode="clip")  # clipping nothing, faster than [...]


def prepare(files, folder, sample, seed, workers, val_fraction, min_count):
    """Fills an empty folder from files; returns what its corpus.json says. ValueError names a bad file and member."""
    sizes, totals = [f.stat().st_size for f in files], np.zeros(sys.maxunicode + 1, np.int64)
    waiting, parts = deque(), []  # shards being encoded; of those in the file what renumber has to know
    number, last, keep, phase = 0, None, False, random.Random(seed).random()
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None)
    with ThreadPoolExecutor(workers) as pool, open(folder / "train.bin", "wb") as train, bar:
        def write():
            (ids, counts, stand_ins, codes), position = waiting[0][0].result(), waiting.popleft()[1]
            train.write(ids)
            totals[codes] += counts[stand_ins]
            counts[stand_ins] = 0
            totals[: 2**16] += counts
            parts.append((len(ids), counts[ord(END)], stand_ins, codes))
            bar.set_postfix(documents=f"{totals[ord(END)]:,}", refresh=False)
            bar.update(position - bar.n)

        for file, before in zip(files, np.cumsum([0, *sizes])):
            for name, data, position in shards(file):
                if name != last:  # another shard: every 1/sample-th is kept, from a random one on
                    keep = int((number + 1) * sample + phase) > int(number * sample + phase)
                    number, last = number + 1, name
                if keep:
                    waiting.append((pool.submit(encode, name, data), before + position))
                while len(waiting) > 2 * workers:  # no more at once: memory stays bounded
                    write()
        while waiting:
            write()

        documents, length, closed = int(totals[ord(END)]), int(totals.sum()), np.cumsum([part[1] for part in parts])
        if not documents:
            raise ValueError(f"no documents in {number} shards, of which --sample {sample} was taken")
        known = totals >= min_count
        known[[ord(END), ord(UNK)]] = True
        vocabulary = np.flatnonzero(known)
        if len(vocabulary) > 2**16:
            raise ValueError(f"{len(vocabulary):,} different characters are more than {2**16:,}: "
                             f"raise --min_count above {min_count}")
        final = np.full(len(totals), np.searchsorted(vocabulary, ord(UNK)), "<u2")
        final[vocabulary] = np.arange(len(vocabulary))

        train.flush()
        ids = np.memmap(folder / "train.bin", "<u2", "r+")
        offsets = np.cumsum([0, *(part[0] for part in parts)])
        list(pool.map(lambda i, j, part: renumber(ids[i:j], final, *part[2:]), offsets, offsets[1:], parts))
        if documents == 1:  # a single text is cut by position, as load_data does
            cut = int((1 - val_fraction) * (length - 1))
        else:               # others between documents
            wanted = min(max(int((1 - val_fraction) * documents), 1), documents - 1)
            i = int(np.searchsorted(closed, wanted))  # the shard with the last END before the cut
            ends = np.flatnonzero(ids[offsets[i] : offsets[i + 1]] == final[ord(END)])
            cut = int(offsets[i] + ends[wanted - closed[i] - 1]) + 1
        ids[cut:].tofile(folder / "val.bin")
        ids = None  # Windows cuts nothing off a file that is mapped
        train.truncate(2 * cut)
    corpus = dict(documents=documents, characters=length - documents, vocabulary=len(vocabulary), train=cut,
                  val=length - cut, unknown=int(totals[~known].sum() + totals[ord(UNK)]), sources=[*map(str, files)])
    for name, content in (("vocab.json", [chr(c) for c in vocabulary]), ("corpus.json", corpus)):
        (folder / name).write_text(json.dumps(content, indent=1 if content is corpus else None), "utf-8")
    return corpus


def main(argv=None):
    """The command line. Returns the exit status."""
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="prepare_owt.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz or .txt files, or folders of them")
    for name, default, note in (
            ("out", Path("data/owt"), "folder to write"), ("sample", 1.0, "share of the shards to take"),
            ("seed", 1337, "chooses them"), ("workers", os.cpu_count(), "threads"),
            ("val_fraction", 0.1, "share for validation"), ("min_count", 1, "rarer characters become UNK")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{note} ({default})")
    try:
        flags = vars(parser.parse_args(argv))
        for name, low, high in (("sample", 1e-9, 1), ("val_fraction", 1e-9, 0.999), ("workers", 1, 1024),
                                ("min_count", 1, 2**62)):
            if not low <= flags[name] <= high:
                fail(f"--{name} must be from {low} to {high}, not {flags[name]}")
        out, files = flags.pop("out"), []
        for source in flags.pop("sources"):
            inside = source.iterdir() if source.is_dir() else ()
            files += sorted(f for f in inside if f.suffix in (".tar", ".xz", ".txt")) if source.is_dir() else [source]
        if out.exists() and {p.name for p in out.iterdir()} - {"train.bin", "val.bin", "vocab.json", "corpus.json"}:
            fail(f"{out}: holds other files; name a folder of its own with --out")
        new, old = (out.with_name(out.name + end) for end in (".tmp", ".old"))
        shutil.rmtree(new, ignore_errors=True)  # what a killed run left
        new.mkdir(parents=True)
        try:
            corpus = prepare(files, new, **flags)
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            new.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        print("{documents:,} documents, {characters:,} characters, {unknown:,} of them unknown, "
              "vocabulary {vocabulary:,}".format(**corpus))
        print(f"train on it: python gpt.py --data {shlex.quote(str(out))}")
        return 0
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        line = "".join(c if c.isprintable() else UNK for c in " ".join(text.split()))  # a name may hold escapes
        print(f"prepare_owt.py: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
