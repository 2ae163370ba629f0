#!/usr/bin/env bash
# An .xz file may hold several streams, with zeros between and behind them ("stream padding", in fours;
# section 2.2 of the .xz file format). xz reads all of it. Python's lzma module does not:
#   zeros between two streams: the second stream is dropped, without an error, by lzma.decompress and
#       lzma.open alike (and so by tarfile, which uses the latter for .tar.xz);
#   zeros behind the last stream: refused as if the file were cut off.
# Seen with Python 3.10.13, 3.11.7, 3.12.1 and 3.13.0, and xz 5.4.1. Whoever reads files that others have
# joined or padded should read stream by stream, with LZMADecompressor and its unused_data.
# Needs python3 and xz. Exit status 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
echo "first" | xz -c > first.xz
echo "second" | xz -c > second.xz
head -c 4 /dev/zero > zeros
cat first.xz zeros second.xz > between.xz
cat first.xz zeros > behind.xz
xz --test between.xz behind.xz
echo "xz, zeros between:     $(xz -dc between.xz | tr '\n' ' ')"
echo "xz, zeros behind:      $(xz -dc behind.xz | tr '\n' ' ')"
python3 - <<'PYTHON'
import lzma, sys

def attempt(read):
    try:
        return read()
    except (lzma.LZMAError, EOFError) as error:
        return repr(error)

between = open("between.xz", "rb").read()
behind = open("behind.xz", "rb").read()
found = [attempt(lambda: lzma.decompress(between)), attempt(lambda: lzma.open("between.xz").read()),
         attempt(lambda: lzma.decompress(behind)), attempt(lambda: lzma.open("behind.xz").read())]
print("Python", sys.version.split()[0])
for name, result in zip(("decompress, between", "open, between", "decompress, behind", "open, behind"), found):
    print(f"{name:22} {result}")
as_seen = found[:2] == [b"first\n"] * 2 and "Error" in str(found[2]) and "Error" in str(found[3])
sys.exit(0 if as_seen else 1)
PYTHON
