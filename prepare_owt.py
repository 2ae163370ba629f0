"""Turns OpenWebText, or any archive of texts, into the memory-mapped folder that gpt.py trains on.

    python prepare_owt.py openwebtext.tar.xz --out data/owt
    python prepare_owt.py urlsf_subset*.tar --out data/owt --sample 0.01
    python gpt.py --data data/owt

The real corpus is 8 million documents, 40 GB, in an archive of 20,610 shards; a shard is an xz-compressed tar (sic) of
one .txt file a document. It is larger than memory, so it streams: threads decompress a shard each (lzma and numpy let
the others run meanwhile), and its text goes to one file as UTF-16. When all characters are known, a second pass turns
that into token ids, in place. Nothing is unpacked to disk, and no name in an archive becomes a file's.
"""
import argparse, io, json, lzma, math, os, random, re, shlex, shutil, sys, zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

END, UNK = "\x03", "\ufffd"  # as in gpt.py, which is not imported: torch would take longer to load than a small corpus


def members(file, name):
    """Yields (name, bytes) of each regular file in an open tar, in order. ValueError if it is damaged or cut off."""
    long, member = b"", "its start"
    try:
        while (block := file.read(512)) != bytes(512):  # a tar ends with zeros
            # What tarfile does, some five times faster: a header is 512 bytes with a name, a size and a sum in octal.
            size, total = (int(block[i:j].strip(b" \0") or b"0", 8) for i, j in ((124, 136), (148, 156)))
            found = zlib.adler32(block[:148] + b" " * 8 + block[156:], 0) % 2**16  # this half of it is the plain sum
            if total != found or not 0 <= size < 2**30:
                raise EOFError("not the header of a file below 1 GiB")
            member = (long or block[:100].partition(b"\0")[0]).decode("utf-8", "replace")
            kind, data = block[156:157], file.read(-(-size // 512) * 512)[:size]
            if len(data) < size:
                raise EOFError("it ends inside a file")
            if kind in b"0\0":  # folders, links and devices hold no text
                yield member, data
            long = b""
            if kind in b"Lx":  # the next file's name has more than 100 bytes: as GNU writes it, or as POSIX does
                long = data.rstrip(b"\0") if kind == b"L" else b"".join(re.findall(rb"\d path=(.*)\n", data))
        while file.read(2**20):  # an .xz knows only at its very end whether it is whole
            pass
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise ValueError(f"{name}: corrupt in or after {member}: {error}") from None


def decode(documents):
    """[bytes] -> [str]: UTF-8, \\n at line ends, closed by END; what is not UTF-8, and an END inside, become UNK."""
    texts = (d.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").replace(END, UNK) for d in documents)
    # Looking for \r first is four times faster.
    return [(text.replace("\r\n", "\n") if "\r" in text else text) + END for text in texts if text]


def shards(path):
    """Yields (name, bytes of an .xz or decoded [str], bytes read so far) for each shard in the file at path."""
    if path.name.endswith((".tar", ".tar.xz")):
        with open(path, "rb") as raw, lzma.open(raw) if path.suffix == ".xz" else raw as file:
            for name, data in members(file, path):
                if name.endswith((".xz", ".txt")):
                    yield f"{path}: {name}", data if name.endswith(".xz") else decode([data]), raw.tell()
    elif path.suffix == ".xz":
        yield path, path.read_bytes(), path.stat().st_size
    elif path.suffix == ".txt":
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            while text := file.read(2**22):
                while text.endswith("\r") and (more := file.read(1)):  # do not part \r from \n
                    text += more
                yield path, [text.replace("\r\n", "\n").replace(END, UNK)], file.buffer.tell()
        yield path, [END] * (path.stat().st_size > 0), path.stat().st_size
    else:
        raise ValueError(f"{path}: not a .tar, .tar.xz, .xz or .txt file, nor a folder of them")


def pairs(units):
    """Characters past 16 bits (an emoji, say), which take two places in UTF-16: (where they begin, code points)."""
    first = np.flatnonzero(units & 0xFC00 == 0xD800)
    return first, 0x10000 + (units[first].astype(np.int64) - 0xD800) * 0x400 + units[first + 1] - 0xDC00


def encode(name, data):
    """A shard -> (its text as UTF-16, 1-D uint16; how often each of the 65,536 units occurs; code points past them)."""
    if isinstance(data, bytes):
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ValueError(f"{name}: corrupt: {error}") from None
        is_tar = data[257:262] in (b"ustar", bytes(5))
        data = decode([d for _, d in members(io.BytesIO(data), name)] if is_tar else [data])
    units = np.frombuffer(b"".join([text.encode("utf-16-le") for text in data]), "<u2")
    return units, np.bincount(units, minlength=2**16), pairs(units)[1]


def renumber(units, ids):
    """UTF-16 -> token ids. ids: that of each code point."""
    first, codes = pairs(units)
    numbers = ids.take(units)
    numbers[first] = ids[codes]
    return np.delete(numbers, first + 1)


def in_order(pool, workers, function, jobs):
    """Yields function(*job) for each job, as pool.map does, but works ahead by a few only: memory stays bounded."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(function, *job))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def prepare(files, folder, sample, seed, workers, val_fraction, min_count):
    """Fills an empty folder from files; returns what its corpus.json says. ValueError names a bad file and member."""
    sizes, totals = [f.stat().st_size for f in files], np.zeros(sys.maxunicode + 1, np.int64)
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None)

    def chosen():
        number, last, keep, phase = 0, None, False, random.Random(seed).random()
        for file, before in zip(files, np.cumsum([0, *sizes])):
            for name, data, position in shards(file):
                if name != last:  # another shard: every 1/sample-th is kept, from a random one on
                    keep = int((number + 1) * sample + phase) > int(number * sample + phase)
                    number, last = number + 1, name
                if keep:
                    yield name, data
                bar.set_postfix_str(f"{totals[ord(END)]:,} documents, {bar.format_sizeof(train.tell() / 2)} characters",
                                    refresh=False)
                bar.update(before + position - bar.n)

    with ThreadPoolExecutor(workers) as pool, bar, open(folder / "train.bin", "wb") as train:
        for units, counts, codes in in_order(pool, workers, encode, chosen()):
            train.write(units)
            totals[: 2**16] += counts
            np.add.at(totals, codes, 1)
        totals[0xD800:0xE000] = 0  # halves of pairs
        documents, length = int(totals[ord(END)]), int(totals.sum())
        if not documents:
            raise ValueError(f"no documents in {' '.join(map(str, files)) or 'empty folders'} at --sample {sample}")
        known = totals >= min_count
        known[[ord(END), ord(UNK)]] = True
        vocabulary = np.flatnonzero(known)
        if len(vocabulary) > 2**16:
            raise ValueError(f"{len(vocabulary):,} different characters are more than {2**16:,}: "
                             f"raise --min_count above {min_count}")
        ids = np.full(len(totals), np.searchsorted(vocabulary, ord(UNK)), "<u2")
        ids[vocabulary] = np.arange(len(vocabulary))

        train.seek(0)
        units = np.memmap(folder / "train.bin", "<u2", "r")
        # A piece ends one unit later where that keeps a pair together.
        bounds = [0, *(i + (units[i - 1] & 0xFC00 == 0xD800) for i in range(2**20, len(units), 2**20)), len(units)]
        jobs = ((units[i:j], ids) for i, j in zip(bounds, bounds[1:]))
        # A single text is cut by position, as load_data does, and others between documents.
        wanted = min(max(int((1 - val_fraction) * documents), 1), documents - 1)
        cut = math.inf if wanted else int((1 - val_fraction) * length)
        done = closed = 0
        with open(folder / "val.bin", "wb") as val:
            for numbers in in_order(pool, workers, renumber, jobs):
                ends = np.flatnonzero(numbers == ids[ord(END)])
                if closed < wanted <= closed + len(ends):
                    cut = done + int(ends[wanted - closed - 1]) + 1
                n = int(min(len(numbers), max(0, cut - done)))
                train.write(numbers[:n])  # never past what has been read
                val.write(numbers[n:])
                done, closed = done + len(numbers), closed + len(ends)
    units = jobs = None  # Windows cuts nothing off a file that is mapped
    os.truncate(folder / "train.bin", 2 * cut)
    corpus = dict(documents=documents, characters=length - documents, vocabulary=len(vocabulary), train=cut,
                  val=length - cut, unknown=int(totals[~known].sum() + totals[ord(UNK)]), sources=[*map(str, files)])
    (folder / "vocab.json").write_text(json.dumps([chr(c) for c in vocabulary]), "utf-8")
    (folder / "corpus.json").write_text(json.dumps(corpus, indent=1), "utf-8")
    return corpus


def main(argv=None):
    """The command line."""
    def fail(message):  # one line, whatever the name of a file holds
        parser.exit(2, f"prepare_owt.py: {''.join(c if c.isprintable() else UNK for c in str(message))}\n")

    parser = argparse.ArgumentParser(prog="prepare_owt.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("sources", nargs="+", type=Path, help=".tar, .tar.xz, .xz or .txt files, or folders of them")
    parser.add_argument("--out", type=Path, default="data/owt", help="folder to write (data/owt)")
    numbers = (("sample", 1.0, 1e-9, 1, "share of the shards to take"), ("seed", 1337, 0, 2**62, "chooses them"),
               ("workers", os.cpu_count(), 1, 1024, "threads"), ("val_fraction", 0.1, 1e-9, 0.999, "for validation"),
               ("min_count", 1, 1, 2**62, "characters rarer than this become UNK"))
    for name, default, _, _, note in numbers:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{note} ({default})")
    flags = vars(parser.parse_args(argv))
    out, files = flags.pop("out"), []
    try:
        for name, _, low, high, _ in numbers:
            if not low <= flags[name] <= high:
                raise ValueError(f"--{name} must be from {low} to {high}, not {flags[name]}")
        for source in flags.pop("sources"):
            inside = source.iterdir() if source.is_dir() else [source]
            files += sorted(f for f in inside if f.suffix in (".tar", ".xz", ".txt") or f == source)
        if out.exists() and {p.name for p in out.iterdir()} - {"train.bin", "val.bin", "vocab.json", "corpus.json"}:
            raise ValueError(f"{out}: holds other files; name a folder of its own with --out")
        new, old = (out.with_name(f"{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
        new.mkdir(parents=True)
        try:
            corpus = prepare(files, new, **flags)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if out.exists():
            out.rename(old)  # if this fails (a program has it open, say), both folders are there
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print("{documents:,} documents, {characters:,} characters, {unknown:,} of them unknown, vocabulary {vocabulary:,}"
          .format(**corpus))
    print(f"train on it: python gpt.py --data {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
