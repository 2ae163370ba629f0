"""Every claim of the README, as a short test: python -m pytest -q

A test is a claim, its name, and the proof. The models are tiny, so that each takes a second or two.
"""
import bz2, copy, functools, gzip, io, json, lzma, math, os, pickle, pty, random, re, resource
import runpy, select, shutil, signal, subprocess, sys, tarfile, time, tracemalloc, zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # for models so tiny, more threads cost more than they give
import numpy as np
import pytest
import torch

import chat, gpt, prepare_owt
from gpt import END, UNK, CharTokenizer, Config

HERE = Path(__file__).parent
WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat.\n", "dog ", "ran "]
TEXT = "".join(random.Random(0).choices(WORDS, k=1000))
TINY = dict(data="book.txt", batch_size=4, block_size=8, n_embd=16, n_head=2, n_layer=2,
            dropout=0.0, max_iters=6, warmup_iters=2, eval_interval=3, eval_iters=2, device="cpu")
SAMPLE = gpt.sample
PAIRS = {"the cat": "sat", "a dog": "ran", "on a mat": "the dog", "é": "cat"}  # no "é" in TEXT


def threads(initializer):
    """What the test of workers replaces by processes again."""
    return ThreadPoolExecutor()


def too_long(number, frame):
    raise TimeoutError("this test took more than three minutes")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    """Each test runs in an empty folder with a book, with Ctrl-C as in a terminal, and fails after
    three minutes. A run shows little of what its model writes, since that would take most time, and
    a preparation works in threads, which start sooner than processes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    np.random.seed(0)
    monkeypatch.setattr(gpt, "sample", lambda model, tokenizer, length: SAMPLE(model, tokenizer, 3))
    monkeypatch.setattr(prepare_owt, "ProcessPoolExecutor", threads)
    Path("book.txt").write_text(TEXT, encoding="utf-8")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hang_up)
    gpt.STOP.clear()


def tiny(**changes):
    """A Config with tiny sizes."""
    return Config(**dict(TINY, **changes))


def flags(**changes):
    """The same settings as words of a command line."""
    words = []
    for name, value in dict(TINY, **changes).items():
        words += [f"--{name}", str(value)]
    return words


def tiny_model(vocab_size=11, **changes):
    """An untrained model with the same weights every time."""
    torch.manual_seed(0)
    return gpt.GPT(tiny(**changes), vocab_size).eval()


def train_tiny(**changes):
    """Trains and returns the checkpoint."""
    settings = dict(TINY, **changes)
    gpt.train(**settings)
    return gpt.load_checkpoint(settings.get("out") or Path(settings["data"]).stem + ".pkl")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The bytes of the checkpoint of a finished run with the settings of TINY."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        Path("book.txt").write_text(TEXT, encoding="utf-8")
        patch.setattr(gpt, "sample", Mock(return_value=""))
        gpt.train(**TINY)
        return Path("book.pkl").read_bytes()


@pytest.fixture
def trained(finished_run):
    """book.pkl, where the command line looks for it, after its six steps."""
    Path("book.pkl").write_bytes(finished_run)


def start(script, words, **options):
    """A script of ours as a process."""
    return subprocess.Popen([sys.executable, HERE / script, *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(script, words, **options):
    """The same, to its end."""
    return subprocess.run([sys.executable, HERE / script, *words], capture_output=True, text=True,
                          timeout=120, **options)


def files_in(folder="."):
    """{path: content} of all files below a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_one_line(message, *named):
    """A message is a single line that names all it must."""
    assert message.count("\n") == 1 and message.endswith("\n"), message
    for name in named:
        assert name in message


def assert_refused(main, words, *named):
    """main(words) ends with status 2 and one line that names all it must; no file has changed."""
    before = files_in()
    stderr = io.StringIO()
    with redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert_one_line(stderr.getvalue(), *named)
    assert files_in() == before


def assert_same(a, b):
    """Equal to the last bit, through dicts and lists."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_run(a, b):
    """Two checkpoints hold the same run, to the last bit."""
    for key in ("model", "best", "optimizer", "losses", "step"):
        assert_same(a[key], b[key])
    assert (a["chars"], a["corpus"]) == (b["chars"], b["corpus"])


def random_text(seed, longest):
    """Characters from all of Unicode, a third of them ASCII."""
    rng = random.Random(seed)
    ranges = [(0, 128), (128, 0xD800), (0xE000, 0x110000)]
    text = ""
    for _ in range(rng.randrange(1, longest)):
        low, high = rng.choice(ranges)
        text += chr(rng.randrange(low, high))
    return text


def pair(prompt, completion):
    """A line of a .jsonl."""
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------ tokenizer and data

@pytest.mark.parametrize("seed", range(10))
def test_encode_and_decode_are_inverse_over_all_of_unicode(seed):
    text = random_text(seed, 300)
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.chars[i] for i in ids) == text


def test_the_vocabulary_is_the_sorted_set_of_characters_with_end_and_unk():
    tokenizer = CharTokenizer("banana")
    assert tokenizer.chars == END + "abn" + UNK
    assert tokenizer.vocab_size == 5
    assert (tokenizer.end, tokenizer.unk) == (0, 4)
    assert tokenizer.encode("").shape == (0,)


def test_unknown_characters_become_unk_and_never_fail():
    tokenizer = CharTokenizer("ab")
    ids = tokenizer.encode("a☃b\ud800\U0010ffff")
    assert tokenizer.decode(ids) == f"a{UNK}b{UNK}{UNK}"


def test_a_vocabulary_has_at_most_as_many_characters_as_2_bytes_can_number():
    chars = [chr(code) for code in range(0x10000, 0x20000 - 2)]
    assert CharTokenizer(chars).encode(chars[-1]) == [2**16 - 1]  # END and UNK come first
    with pytest.raises(ValueError, match="65,537 different characters .* --min_count"):
        CharTokenizer([*chars, "a"])



@pytest.mark.parametrize("seed", range(5))
def test_a_text_in_pieces_has_the_ids_of_the_whole(seed):
    pieces = [random_text(seed, 50), "", random_text(seed + 5, 50), "\ud800a"]
    text = "".join(pieces)
    tokenizer = CharTokenizer(text[::2])
    ids = gpt.encode_pieces(iter(pieces), tokenizer)
    assert ids.dtype == np.uint16
    assert np.array_equal(ids, tokenizer.encode(text))


MEGABYTE = 2**20  # the size of a piece
UP_TO_THE_BORDER = b"a" * (MEGABYTE - 1)


@pytest.mark.parametrize("content, text", [
    (b"", ""),
    ("\ufeffone\r\ntwo\x03é".encode(), f"one\ntwo{UNK}é"),
    ("one\rtwo\r\r\nthree\n\rfour\ufeff".encode(), "one\ntwo\n\nthree\n\nfour\ufeff"),
    ("\ufeffé日\r\n😀".encode("utf-16-le"), "é日\n😀"),
    ("\ufeffé日\r\n😀".encode("utf-16-be"), "é日\n😀"),
    (UP_TO_THE_BORDER + b"\r\nb", "a" * (MEGABYTE - 1) + "\nb"),
    (UP_TO_THE_BORDER + b"\r", "a" * (MEGABYTE - 1) + "\n"),
    (UP_TO_THE_BORDER + "é日😀".encode(), "a" * (MEGABYTE - 1) + "é日😀"),
    (("\ufeff" + "a" * (MEGABYTE // 2 - 2) + "😀é").encode("utf-16-be"),
     "a" * (MEGABYTE // 2 - 2) + "😀é"),  # each half of the 😀 is in a piece of its own
    (("\ufeff" + "a" * (MEGABYTE // 2 - 2) + "\r\né").encode("utf-16-le"),
     "a" * (MEGABYTE // 2 - 2) + "\né"),
], ids=["empty", "utf-8", "line ends", "utf-16-le", "utf-16-be", "line end at the border",
        "line end at the border and the end", "character across the border",
        "utf-16 across the border", "utf-16 line end across the border"])
def test_a_text_is_read_by_its_byte_order_mark_with_one_kind_of_line_end(content, text):
    Path("text").write_bytes(content)
    assert "".join(gpt.read_text("text")) == text


LONG = b"ab\r\n" * MEGABYTE  # four pieces


@pytest.mark.parametrize("content, line", [
    ("ab\ncafé".encode("latin-1"), 2),
    (b"a\n\n\0b", 3),
    (b"\x1f\x8b\x08\0\0\0\0\0", 1),  # of a .gz
    (UP_TO_THE_BORDER + "é".encode()[:1], 1),  # a character without its end
    (LONG + b"a\n\xe9\n", 1_048_578),
    (LONG + b"a\n\0\n", 1_048_578),
], ids=["latin-1", "NUL", "gz", "half a character", "latin-1 late", "NUL late"])
def test_what_is_no_text_is_refused_with_the_line_and_what_to_do(content, line):
    Path("bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt, line {line:,}: .* UTF-8, .*prepare_owt.py"):
        for _ in gpt.read_text("bad.txt"):
            pass


def test_damaged_utf_16_is_refused():
    Path("bad.txt").write_bytes("\ufeffa\nb".encode("utf-16-le")[:-1])
    with pytest.raises(ValueError, match="bad.txt, from line 1 on: .*utf-16"):
        list(gpt.read_text("bad.txt"))


def test_a_text_with_curly_quotes_takes_little_more_memory_than_its_ids():
    """An id has 2 bytes. A Python string of all characters would take as much again."""
    line = "“Quoted,” he said, and then the cat sat on the mat.\n"
    length = 30_000_000
    Path("quotes.txt").write_text(line * (length // len(line)), "utf-8")
    config = tiny(data="quotes.txt")
    tracemalloc.start()
    gpt.load_data(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.6 * length


def split_texts(data, block_size):
    """The train and the val split of some data, decoded."""
    splits, tokenizer = gpt.load_data(tiny(data=data, block_size=block_size))
    return tokenizer.decode(splits["train"]), tokenizer.decode(splits["val"])


def test_the_last_tenth_of_a_text_is_for_validation():
    Path("text.txt").write_text("a" * 90 + "b" * 9)  # 100 with END
    assert split_texts("text.txt", block_size=4) == ("a" * 90, "b" * 9 + END)



@pytest.mark.parametrize("name, kind", [
    ("", "Python's documentation"), ("prepared", "prepared folder"), ("book.txt", "text"),
    ("a.jsonl", "pairs"), ("A.JSONL", "pairs"), ("a.ndJSON", "pairs"), ("a.json", "pairs"),
    ("texts.jsonl", "folder of texts")])
def test_a_corpus_is_told_by_its_name_and_what_is_in_a_folder(name, kind):
    Path("prepared").mkdir()
    Path("prepared/vocab.json").touch()
    Path("texts.jsonl").mkdir()
    assert gpt.kind_of(name) == kind


def test_the_texts_of_a_folder_and_its_folders_are_documents_and_the_rest_is_counted(capsys):
    for name in ("texts/b.txt", "texts/sub/c.TXT", "texts/._1.txt", "texts/a.md", "texts/d.gz"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name * 20)
    Path("texts/link").symlink_to("sub")
    splits, tokenizer = gpt.load_data(tiny(data="texts"))
    text = tokenizer.decode(splits["train"]) + tokenizer.decode(splits["val"])
    assert text == "texts/b.txt" * 20 + END + "texts/sub/c.TXT" * 20 + END
    assert capsys.readouterr().out == "texts: 3 files are no .txt and are not read\n"


def test_a_folder_that_may_not_be_read_is_refused(monkeypatch):
    """Whoever runs the tests may be allowed to read everything, so the system's answer is faked."""
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    Path("texts").mkdir()
    Path("texts/a.txt").write_text(TEXT)
    monkeypatch.setattr(os, "scandir", scandir)
    assert_refused(gpt.main, flags(data="texts"), "Permission denied: 'texts'")
    assert_refused(prepare_owt.main, ["texts", "--out", "prepared"], "Permission denied: 'texts'")


def test_a_pipe_is_refused_as_a_text_is_read_twice():
    os.mkfifo("pipe.txt")
    assert_refused(gpt.main, flags(data="pipe.txt"), "pipe.txt is no file: save the text in one")


def test_a_long_mistake_is_a_line_that_one_can_read():
    write_pairs(json.dumps({"prompt": "p", "completion": list(range(10_000))}))
    stderr = io.StringIO()
    with redirect_stderr(stderr), pytest.raises(SystemExit):
        gpt.main(flags(data="pairs.jsonl"))
    assert_one_line(stderr.getvalue(), "completion must be a text")
    assert len(stderr.getvalue()) < 1100


def write_pairs(*lines):
    """pairs.jsonl with these lines."""
    Path("pairs.jsonl").write_text("".join(lines), "utf-8")


def test_a_pair_is_a_document_of_two_lines():
    write_pairs(pair("a", "b"), "\n \r\n", pair("c\x03\u2028", "d\r\ne\rf"))
    assert gpt.read_pairs("pairs.jsonl") == [f"a\nb{END}", f"c{UNK}\u2028\nd\ne\nf{END}"]


@pytest.mark.parametrize("object, text", [
    ({"id": 7, "prompt": "p", "completion": "c"}, "p\nc"),
    ({"question": "p", "answer": "c"}, "p\nc"),
    ({"question": "p", "response": "c"}, "p\nc"),
    ({"instruction": "p", "output": "c"}, "p\nc"),
    ({"instruction": "p", "input": "", "output": "c"}, "p\nc"),
    ({"instruction": "p", "output": "c", "input": "i"}, "p\ni\nc")])
def test_pairs_may_have_the_names_that_data_sets_use(object, text):
    assert gpt.parse_pair(json.dumps(object)) == text + END


@pytest.mark.parametrize("line, reason", [
    ('{"prompt": ', "this is no JSON object, one for each pair: {"),
    ("[1]", r"this is no JSON object, one for each pair: \[1\]"),
    ("{}", "no prompt and completion; its names are: none"),
    ('{"prompt": "a", "text": "b"}', "its names are: prompt, text"),
    ('{"answer": "a", "input": "b"}', "its names are: answer, input"),
    ('{"prompt": "2+2", "completion": 4}', "completion must be a text, not 4"),
    ('{"instruction": "a", "input": ["b"], "output": "c"}', "input must be a text, not ..b")])
def test_a_line_that_is_no_pair_is_refused_with_its_number_and_what_is_wrong(line, reason):
    write_pairs(pair("a", "b"), "\n", line)
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 3: .*{reason}"):
        gpt.read_pairs("pairs.jsonl")


def test_at_least_two_pairs_are_needed():
    write_pairs(pair("a", "b"))
    with pytest.raises(ValueError, match="pairs.jsonl: at least two pairs"):
        gpt.read_pairs("pairs.jsonl")


def write_numbered_pairs(count, length):
    """A file of pairs of the given length, and the list of their texts."""
    answer = "a" * (length - 6)  # a question has four characters, and there are a line end and END
    write_pairs(*[pair(str(number), answer) + "\n" for number in range(1000, 1000 + count)])
    return gpt.read_pairs("pairs.jsonl")


def load_numbered_pairs(seed=0):
    """The pairs of both splits, in their order."""
    splits, tokenizer = gpt.load_data(tiny(data="pairs.jsonl", seed=seed))
    train = tokenizer.decode(splits["train"]).split(END)[:-1]
    val = tokenizer.decode(splits["val"]).split(END)[:-1]
    return [text + END for text in train], [text + END for text in val]


@pytest.mark.parametrize("count, to_train", [(2, 1), (9, 8), (10, 9), (11, 9), (20, 18)])
def test_pairs_are_split_by_their_number(count, to_train):
    pairs = write_numbered_pairs(count, 10000)
    train, val = load_numbered_pairs()
    assert set(train) == set(pairs[:to_train])
    assert set(val) == set(pairs[to_train:])


def test_few_pairs_come_again_in_another_order_until_they_are_a_million_characters():
    pairs = write_numbered_pairs(112, 1000)
    train, val = load_numbered_pairs()
    assert len(train) == 1000 and len(val) == 84 * 12  # the first multiple of 12 above 1,000
    for start in range(0, 1000, 100):
        order = train[start : start + 100]
        assert order != pairs[:100]
        assert sorted(order) == pairs[:100]
    assert train[:100] != train[100:200]
    assert load_numbered_pairs() == (train, val)
    assert load_numbered_pairs(seed=1) != (train, val)


def test_pairs_of_a_million_characters_come_once_in_random_order():
    pairs = write_numbered_pairs(112, 10000)
    train, _ = load_numbered_pairs()
    assert train != pairs[:100]
    assert sorted(train) == pairs[:100]


def test_the_corpus_line_counts_pairs_and_those_longer_than_a_block(capsys):
    write_pairs(pair("abcd", "ab"), pair("a" * 900, "b"), pair("abcd", "abc"), pair("a", "b"))
    gpt.load_data(tiny(data="pairs.jsonl"))  # with END, they have 8, 903, 9 and 4 characters
    assert capsys.readouterr().out == ("corpus  pairs.jsonl: pairs, 3 to train on and 1 kept back; "
                                       "2 are longer than block_size\n")


def test_the_default_corpus_needs_no_download():
    splits, tokenizer = gpt.load_data(Config(device="cpu"))
    text = tokenizer.decode(splits["train"])
    assert len(text) > 200_000
    assert "statement" in text and END in text


@pytest.mark.parametrize("length, of_val", [(50, 6), (19, 2)])
def test_both_splits_must_be_longer_than_a_block(length, of_val):
    Path("short.txt").write_text(TEXT[:length])
    message = f"short.txt: too short: its val split has {of_val} .* than block_size, {of_val}$"
    with pytest.raises(ValueError, match=message):
        gpt.load_data(tiny(data="short.txt", block_size=of_val))
    gpt.load_data(tiny(data="short.txt", block_size=of_val - 1))


def test_characters_that_the_model_to_start_from_lacks_are_named(capsys):
    Path("other.txt").write_text("ab" + "é☃ab" * 50)
    gpt.load_data(tiny(data="other.txt"), chars="ab" + END)
    output = capsys.readouterr().out
    assert output == ("unknown 2 of 5 different characters, which the model cannot tell apart: "
                      "é ☃\n")
    gpt.load_data(tiny(data="other.txt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("block_size, batch_size", [(1, 1), (7, 3), (19, 8)])
def test_batches_are_shifted_by_one_and_stay_in_their_split(block_size, batch_size):
    config = tiny(block_size=block_size, batch_size=batch_size, grad_accum=20)
    data = np.arange(block_size + 4, dtype=np.uint16)
    firsts = set()
    for _, x, y in gpt.draw_batches(data, config, step=0):
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (batch_size, block_size)
        assert torch.equal(y, x + 1)
        assert torch.equal(x[:, -1], x[:, 0] + block_size - 1)
        firsts.update(x[:, 0].tolist())
    assert firsts == {0, 1, 2, 3}  # the last block ends where the data ends


def own_memory():
    """KiB of memory that belong to this process alone (a mapped file's pages do not)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_memory_follows_neither_the_size_of_the_file_nor_the_number_of_batches():
    config = tiny(batch_size=64, block_size=256, grad_accum=20)
    large = np.memmap("large.bin", np.uint16, "w+", shape=10**8)  # a sparse file of 200 MB
    before = own_memory()
    for step in range(2):  # the first step shows what one takes, and imports what it needs
        tracemalloc.start()
        for batch in gpt.draw_batches(large, config, step):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert own_memory() - before < 20 * 1024
    assert peak < 10 * 64 * 257 * 8  # the ids of ten batches


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
    """What prepare_owt.py makes of the book."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "book.txt").write_text(TEXT)
    prepare_owt.main([str(folder / "book.txt"), "--out", str(folder / "new")])
    return folder / "new"


@pytest.fixture
def prepared(prepared_folder):
    """A copy of it in the folder of the test."""
    shutil.copytree(prepared_folder, "prepared")
    return Path("prepared")


def test_a_prepared_folder_is_trained_on_in_place(prepared):
    splits, tokenizer = gpt.load_data(tiny(data="prepared"))
    assert isinstance(splits["train"], np.memmap)
    ids = np.concatenate([splits["train"], splits["val"]])
    assert tokenizer.decode(ids) == TEXT + END
    assert train_tiny(data="prepared")["step"] == 6


# ---------------------------------------------------------------------------------------- settings

@pytest.mark.parametrize("name, value", [
    ("n_layer", 2.9), ("compile", "False"), ("data", None), ("seed", "1"), ("dropout", "0.1"),
    ("n_embd", True), ("optimizer", "sgd"), ("dtype", "float16"), ("device", "cuda:99"),
    ("n_embd", 0), ("batch_size", -1), ("max_iters", -1), ("block_size", 2**31 + 1),
    ("n_layer", 1001), ("dropout", 1), ("dropout", -0.1), ("dropout", math.nan),
    ("learning_rate", math.inf), ("grad_clip", -1.0), ("seed", -1)])
def test_a_setting_that_cannot_work_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        Config(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("n_layer", 0), ("max_iters", 0), ("warmup_iters", 0), ("seed", 0), ("n_embd", 1),
    ("n_layer", 1000), ("dropout", 0.99), ("dropout", 0), ("learning_rate", 1)])
def test_a_setting_at_its_limit_is_taken(name, value):
    assert getattr(Config(**{name: value}), name) == value


def readme_table():
    """{flag: (default, default on a GPU)} as the README says, in words."""
    table = {}
    for line in (HERE / "README.md").read_text("utf-8").splitlines():
        if line.startswith("| `--"):
            flag, default, on_gpu, _ = line[2:].split(" | ", maxsplit=3)
            table[flag.strip("`-")] = (default.strip(), on_gpu.strip() or default.strip())
    return table


def test_the_defaults_are_those_of_the_readme(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    table = readme_table()
    assert list(table) == [field.name for field in fields(Config)]
    assert gpt.defaults_for("cpu") == gpt.defaults_for("mps") == {}
    on_cpu = Config()
    on_gpu = Config(**gpt.defaults_for("cuda"))
    for field in fields(Config):
        if field.name == "device":
            continue
        for words, config in zip(table[field.name], (on_cpu, on_gpu)):
            value = getattr(config, field.name)
            word = words.split(",")[0].split(" ")[0]  # without its conditions
            assert str(value) == word or value == field.type(word), field.name


def test_help_lists_each_flag_with_its_comment_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        gpt.main(["--help"])
    output = " ".join(capsys.readouterr().out.split())
    source = Path(gpt.__file__).read_text("utf-8")
    comments = re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", source, re.MULTILINE)
    defaults = Config(**gpt.defaults_for(Config.device))
    assert [name for name, _ in comments] == [field.name for field in fields(Config)]
    for name, comment in comments:
        assert f" --{name}" in output
        assert f"{comment} (default: {getattr(defaults, name)})" in output


@pytest.mark.parametrize("script", [gpt, chat, prepare_owt])
def test_a_script_runs_without_its_docstrings(script, monkeypatch, capsys):
    """As under python -OO, which drops them."""
    bare = type(script)("bare")
    bare.__file__ = script.__file__
    monkeypatch.setitem(sys.modules, "bare", bare)
    source = Path(script.__file__).read_text("utf-8")
    exec(compile(source, script.__file__, "exec", optimize=2), vars(bare))
    assert bare.main.__doc__ is None
    with pytest.raises(SystemExit):
        bare.main(["--help"])
    assert "--seed" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- model

def test_the_fast_attention_is_the_one_written_out():
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    head = gpt.Head()
    assert torch.allclose(head.written_out(q, k, v), head(q, k, v), atol=1e-6)


def test_a_model_can_be_exported_for_texts_of_any_length():
    """For the exporter, a length is a symbol, and what is compared with it is no Python bool."""
    model = tiny_model()
    length = torch.export.Dim("length", min=2, max=8)
    example = torch.zeros(1, 4, dtype=torch.int64)
    exported = torch.export.export(model, (example,), dynamic_shapes=({1: length},)).module()
    for T in (3, 7):
        index = torch.randint(11, (1, T))
        assert torch.allclose(exported(index)[0], model(index)[0], atol=1e-6)


def test_a_block_adds_and_then_norms():
    block = tiny_model().blocks[0]
    x = torch.randn(2, 8, 16)
    middle = block.norm1(x + block.attention(x))
    assert torch.allclose(block(x), block.norm2(middle + block.feedforward(middle)), atol=1e-6)


def test_only_queries_keys_and_values_are_made_without_a_bias():
    modules = tiny_model().named_modules()
    linears = {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}
    without = [name for name, module in linears.items() if module.bias is None]
    assert without == ["blocks.0.attention.qkv", "blocks.1.attention.qkv"]
    assert len(linears) == 2 * 4 + 1


def test_feedforward_is_linear_relu_linear_and_dropout():
    layers = [type(layer).__name__ for layer in tiny_model().blocks[0].feedforward]
    assert layers == ["Linear", "ReLU", "Linear", "Dropout"]


@pytest.mark.parametrize("part", ["attention", "feedforward"])
def test_dropout_turns_off_its_share_of_what_a_part_puts_out_in_training_alone(part):
    module = getattr(tiny_model(dropout=0.3).blocks[0], part)
    x = torch.randn(20, 8, 16)
    kept = module(x)
    assert (kept == 0).sum() == 0
    dropped = module.train()(x)
    off = dropped == 0
    assert off.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.allclose(dropped[~off], kept[~off] / 0.7, atol=1e-5)


@pytest.mark.parametrize("t", range(1, 8))
def test_the_future_never_changes_the_past(t):
    model = tiny_model()
    index = torch.randint(11, (2, 8))
    changed = index.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 11
    logits, _ = model(index)
    others, _ = model(changed)
    assert torch.allclose(logits[:, :t], others[:, :t], atol=1e-6)


@pytest.mark.parametrize("n_layer, the_past_counts", [(2, True), (0, False)])
def test_the_past_changes_the_future_unless_there_is_no_attention(n_layer, the_past_counts):
    model = tiny_model(n_layer=n_layer)
    index = torch.randint(11, (2, 8))
    changed = index.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    logits, _ = model(index)
    others, _ = model(changed)
    same = torch.allclose(logits[:, -1], others[:, -1])
    assert same != the_past_counts


def test_weights_start_as_a_narrow_normal_distribution_and_biases_at_0():
    model = tiny_model(81, n_embd=128, n_layer=4, block_size=128)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.mean()) < 2e-3
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_the_loss_is_the_cross_entropy_and_starts_at_that_of_an_even_guess(dtype, tolerance):
    model = tiny_model(81, n_embd=64, block_size=64)
    x, y = torch.randint(81, (2, 8, 64))
    logits, no_loss = model(x)
    shares = logits.log_softmax(dim=-1)
    expected = -shares.gather(-1, y[..., None]).mean().item()
    with gpt.autocast(tiny(dtype=dtype)):
        logits, loss = model(x, y)
    assert no_loss is None
    assert logits.shape == (8, 64, 81) and logits.dtype == getattr(torch, dtype)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=tolerance)
    assert loss.item() == pytest.approx(math.log(81), abs=0.05)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    x, y = torch.randint(11, (2, 4, 8))
    _, loss = model(x, y)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.any()


def test_a_text_longer_than_a_block_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="9 characters .* block_size is 8"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.int64))


# -------------------------------------------------------------------------------------- generation

def stream_with_logits(model, index, *options):
    """(the text, the logits of the last position at each step) of a generation."""
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output[0][:, -1]))
    torch.manual_seed(1)
    text = model.generate(index, *options)
    hook.remove()
    return text, seen


@pytest.mark.parametrize("seed", range(15))
def test_cached_logits_equal_uncached_inside_the_window_and_after_each_slide(seed):
    rng = random.Random(seed)
    T = rng.randint(1, 12)
    heads = rng.choice([1, 2, 4])
    vocab_size = rng.randint(2, 30)
    count = rng.randint(0, 40)
    model = tiny_model(vocab_size, block_size=T, n_head=heads, n_embd=8 * heads,
                       n_layer=rng.randint(0, 3))
    index = torch.randint(vocab_size, (rng.randint(1, 3), rng.randint(1, 30)))
    text, seen = stream_with_logits(model, index, count, rng.choice([0, 0.5, 1.0, 5.0]))
    assert len(seen) == count
    assert text.dtype == torch.int64 and text.shape == (len(index), index.shape[1] + count)
    assert torch.equal(text[:, :index.shape[1]], index)
    first = max(0, index.shape[1] - T)  # of the window, which slides to its last half when full
    for end, logits in enumerate(seen, start=index.shape[1]):
        if end - first > T:
            first = end - max(1, T // 2)
        expected, _ = model(text[:, first:end])
        assert torch.allclose(logits, expected[:, -1], atol=1e-5)


def test_only_the_newest_character_is_read_until_the_window_is_full():
    model = tiny_model()
    read = []
    model.tokens.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    model.generate(torch.zeros(1, 5, dtype=torch.int64), 9)
    assert read == [5, 1, 1, 1, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("temperature, top_k", [(0.5, None), (2.0, None), (2.0, 3), (1.0, 99)])
def test_characters_are_drawn_by_the_shares_that_temperature_and_top_k_leave(temperature, top_k):
    model = tiny_model(6)
    model.lm_head.weight.data *= 20
    logits, _ = model(torch.zeros(1, 1, dtype=torch.int64))
    scores = logits[0, 0] / temperature
    lowest = scores.sort(descending=True).values[:top_k].min()
    shares = scores.masked_fill(scores < lowest, -math.inf).softmax(dim=-1)
    text = model.generate(torch.zeros(20_000, 1, dtype=torch.int64), 1, temperature, top_k)
    drawn = torch.bincount(text[:, 1], minlength=6) / 20_000
    assert torch.allclose(drawn, shares, atol=0.015)
    assert torch.equal(drawn == 0, shares == 0)


def test_without_options_characters_are_drawn_by_the_models_own_shares():
    model = tiny_model()
    index = torch.zeros(99, 1, dtype=torch.int64)
    logits = torch.randn(99, 11)
    drawn = []
    for options in ([], [1.0, None]):
        for draw in (model.generate, model.stream):
            torch.manual_seed(1)
            drawn.extend(draw(index, 3, *options))
        drawn.extend(gpt.draw(logits, *options))
    half = len(drawn) // 2
    assert_same(drawn[:half], drawn[half:])


@pytest.mark.parametrize("options, allowed", [
    (dict(temperature=0), {1}), (dict(temperature=1e-7), {1}), (dict(top_k=1), {1}),
    (dict(top_k=2), {1, 3}), (dict(temperature=9.0, top_k=3), {1, 3, 4})])
def test_of_equal_scores_the_first_is_the_likelier(options, allowed):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0]]).bfloat16()
    assert set(gpt.draw(logits.expand(200, -1), **options).flatten().tolist()) == allowed


# ---------------------------------------------------------------------------------------- learning

class Witness(torch.nn.Module):
    """A model with one weight, 1, that keeps what it sees. Its loss is that weight times the mean
    of x, so the mean of x is also its gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.x = []
        self.y = []
        self.seeds = []
        self.modes = set()  # (in training, with gradients, in 16 bits)

    def forward(self, x, y):
        self.x.append(x)
        self.y.append(y)
        self.seeds.append(torch.initial_seed())
        self.modes.add((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return None, x.float().mean() * self.weight.sum()


def take_step(model, optimizer, config, step, *means):
    """A training step in which the batches' gradients are these numbers; returns its loss."""
    batches = [(seed, torch.full((2, 2), mean), None) for seed, mean in enumerate(means)]
    return gpt.training_step(model, [optimizer], batches, config, step).item()


@pytest.mark.parametrize("dtype, in_16_bits", [("float32", False), ("bfloat16", True)])
def test_dtype_holds_in_training_and_evaluation_and_only_training_keeps_gradients(dtype,
                                                                                  in_16_bits):
    model = Witness()
    config = tiny(dtype=dtype)
    take_step(model, torch.optim.SGD(model.parameters()), config, 0, 1.0)
    assert model.modes == {(True, True, in_16_bits)}
    model.modes.clear()
    gpt.estimate_loss(model, {"val": np.arange(9)}, config)
    assert model.modes == {(False, False, in_16_bits)}


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_model_leaves_it_in_the_mode_that_it_had(training):
    tokenizer = CharTokenizer(TEXT)
    model = tiny_model(tokenizer.vocab_size).train(training)
    gpt.estimate_loss(model, {"val": np.arange(9)}, tiny())
    SAMPLE(model, tokenizer, 3)
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 3)
    assert {module.training for module in model.modules()} == {training}


def test_an_evaluation_is_the_mean_of_batches_spread_evenly_over_their_own_split():
    model = Witness()
    splits = {"train": np.arange(100), "val": np.arange(1000, 1080)}
    config = tiny(batch_size=4, eval_iters=3)
    losses = gpt.estimate_loss(model, splits, config)
    assert list(losses) == ["train", "val"]
    seen = {"train": torch.cat(model.x[:3]), "val": torch.cat(model.x[3:])}
    for name, data in splits.items():
        places = np.sort(seen[name][:, 0].numpy())
        steps = np.diff(places)
        assert len(places) == 12
        assert places[0] == data[0]
        assert places[-1] + config.block_size == data[-1]  # as y, one further than x
        assert steps.max() - steps.min() <= 1
        assert losses[name] == pytest.approx(seen[name].float().mean().item())
    assert torch.equal(torch.cat(model.y), torch.cat(model.x) + 1)
    assert losses == gpt.estimate_loss(model, splits, config)


def test_learning_rate_warms_up_and_falls_in_a_line_to_0():
    config = tiny(learning_rate=1.0, warmup_iters=10, max_iters=110)
    rates = [gpt.learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10:] == pytest.approx([step / 100 for step in range(100, -1, -1)])


@pytest.mark.parametrize("max_iters, expected", [(1, [1]), (4, [0.5, 1, 1, 0.5])])
def test_the_warm_up_is_at_most_half_of_a_run(max_iters, expected):
    config = tiny(learning_rate=1.0, warmup_iters=100, max_iters=max_iters)
    rates = [gpt.learning_rate(step, config) for step in range(max_iters)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("grad_clip, length", [(1.0, 1.0), (0.0, 3.0), (5.0, 3.0)])
def test_a_step_goes_by_the_clipped_gradient_times_the_learning_rate(grad_clip, length):
    model = Witness()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = tiny(learning_rate=0.01, grad_clip=grad_clip)
    weight = 1.0
    for step in range(6):
        take_step(model, optimizer, config, step, 3.0)
        weight -= length * gpt.learning_rate(step, config)
        assert model.weight.item() == pytest.approx(weight, abs=1e-6)


def test_a_step_knows_nothing_of_the_gradients_before_it():
    model = Witness()
    optimizer = torch.optim.SGD(model.parameters())
    config = tiny(learning_rate=1.0, grad_clip=0.0)
    take_step(model, optimizer, config, 1, 3.0)
    before = model.weight.item()
    take_step(model, optimizer, config, 1, 5.0)
    assert model.weight.item() == pytest.approx(before - 5.0)


def test_the_gradients_and_losses_of_a_steps_batches_are_averaged():
    model = Witness()
    config = tiny(learning_rate=0.1, grad_clip=0.0)
    loss = take_step(model, torch.optim.SGD(model.parameters()), config, 1, 1.0, 2.0, 6.0)
    assert loss == pytest.approx(3.0)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 3.0)
    assert model.seeds == [0, 1, 2]


def test_adamw_has_betas_of_9_and_99_hundredths_and_shrinks_matrices_alone():
    model = torch.nn.Linear(1, 1)
    weights = {}
    for name, parameter in model.named_parameters():
        parameter.data.fill_(2.0)
        weights[name] = 2.0
    config = tiny(learning_rate=0.1, weight_decay=0.5)
    [optimizer] = gpt.make_optimizers(model, config)
    assert optimizer.defaults["fused"]
    average = 0.0
    square = 0.0
    for step, gradient in enumerate((1.0, -0.3, 0.2), start=1):
        average = 0.9 * average + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        move = average / (1 - 0.9**step) / math.sqrt(square / (1 - 0.99**step))
        weights["weight"] *= 1 - 0.1 * 0.5
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
            weights[name] -= 0.1 * move
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.item() == pytest.approx(weights[name], abs=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_only_matrices_decay(kind):
    model = tiny_model()
    moved = []
    for optimizer in gpt.make_optimizers(model, tiny(optimizer=kind, weight_decay=0.3)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moved.append(id(parameter))
                assert (group["weight_decay"] == 0.3) == (parameter.ndim == 2)
    assert sorted(moved) == sorted(id(parameter) for parameter in model.parameters())


def test_muon_gets_the_matrices_of_the_blocks():
    model = tiny_model()
    _, muon = gpt.make_optimizers(model, tiny(optimizer="muon"))
    assert isinstance(muon, gpt.Muon)
    inside = [p for p in model.blocks.parameters() if p.ndim == 2]
    assert muon.param_groups[0]["params"] == inside


SHAPES = [(16, 48), (48, 16), (32, 32)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square"])
def test_a_step_of_muon_is_that_of_pytorchs_within_the_digits_of_bfloat16(shape, dtype):
    config = tiny(optimizer="muon", learning_rate=0.1, weight_decay=0.5, dtype=dtype)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = copy.deepcopy(ours)
    optimizers = [gpt.Muon([ours], config),
                  torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5,
                                   adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        before = ours.detach().clone()
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs), optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
        assert (ours - theirs).norm() < 0.05 * (ours - before).norm()
        theirs.data.copy_(ours.data)
    assert list(optimizers[0].state[ours]) == ["momentum_buffer"]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_dtype_of_the_run(name, monkeypatch):
    seen = []

    def record(x):
        seen.append((x @ x).dtype)
        return x

    monkeypatch.setattr(gpt, "equalize", record)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    weight.grad = torch.randn(4, 4)
    gpt.Muon([weight], tiny(dtype=name)).step()
    assert seen == [getattr(torch, name)]


def test_muon_works_on_matrices_of_one_shape_together_as_on_each_alone():
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES + SHAPES]
    alone = copy.deepcopy(together)
    optimizers = [gpt.Muon([weight], tiny()) for weight in alone]
    optimizers.append(gpt.Muon(together, tiny()))
    for _ in range(3):
        for weight, other in zip(together, alone):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert len(optimizers[-1].state) == 6


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_equalize_keeps_the_directions_of_a_matrix_and_makes_them_about_equally_strong(scale):
    columns = torch.linalg.qr(torch.randn(3, 12, 12)).Q
    rows = torch.linalg.qr(torch.randn(3, 20, 12)).Q.mT
    strengths = torch.logspace(-1.8, 0, 12).diag()  # the weakest is a hundredth of all together
    wide = columns @ strengths @ rows * scale
    equalized = gpt.equalize(wide)
    factors = columns.mT @ equalized @ rows.mT  # a diagonal, if the directions are the same
    strengths = factors.diagonal(dim1=1, dim2=2)
    assert strengths.min() > 0.68 and strengths.max() < 1.16
    assert torch.allclose(columns @ strengths.diag_embed() @ rows, equalized, atol=1e-4)
    assert torch.allclose(gpt.equalize(wide.mT), equalized.mT, atol=1e-4)
    assert not gpt.equalize(torch.zeros(1, 2, 3)).any()  # no direction, and no division by 0


def losses_of_steps(batch_size, grad_accum):
    """Six training steps -> (their losses, all weights after them)."""
    config = tiny(batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.1)
    splits, tokenizer = gpt.load_data(config)
    model, optimizers, form = gpt.build(config, tokenizer.vocab_size)
    losses = []
    for step in range(6):
        batches = list(gpt.draw_batches(splits["train"], config, step))
        losses.append(gpt.training_step(form, optimizers, batches, config, step).item())
    return losses, torch.nn.utils.parameters_to_vector(model.parameters())


def test_four_batches_of_8_are_one_of_32():
    losses, weights = losses_of_steps(batch_size=8, grad_accum=4)
    expected_losses, expected_weights = losses_of_steps(batch_size=32, grad_accum=1)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert torch.allclose(weights, expected_weights, atol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 2), (1, 2)])
def test_starts_and_seeds_of_batches_follow_from_the_seed_the_step_and_the_number(rank, world,
                                                                                  monkeypatch):
    monkeypatch.setattr(gpt, "RANK", rank)
    monkeypatch.setattr(gpt, "WORLD", world)
    config = tiny(seed=5, grad_accum=4)
    batches = list(gpt.draw_batches(np.arange(1000), config, step=7))
    draw = np.random.default_rng((5, 7))
    starts = draw.integers(0, 1000 - 8, (4, 4))
    seeds = draw.integers(0, 2**62, 4)
    numbers = range(rank, 4, world)
    assert len(batches) == len(numbers)
    for number, (seed, x, _) in zip(numbers, batches):
        assert x[:, 0].tolist() == starts[number].tolist()
        assert seed == seeds[number]


def test_processes_take_the_mean_of_their_gradients(monkeypatch):
    monkeypatch.setattr(gpt, "WORLD", 2)
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, 2.0]])
    model.bias.grad = torch.tensor([3.0])
    of_the_other = torch.tensor([3.0, 4.0, -3.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda vector: vector.add_(of_the_other))
    gpt.average_gradients(model)
    assert model.weight.grad.tolist() == [[2.0, 3.0]]
    assert model.bias.grad.tolist() == [0.0]


def test_the_bare_loop_learns_and_shows_the_losses(capsys):
    config = tiny(max_iters=41, eval_interval=20, learning_rate=0.01)
    splits, tokenizer = gpt.load_data(config)
    gpt.learn(tiny_model(tokenizer.vocab_size), splits, config)
    rows = re.findall(r"^(\d+) .*'val': ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in rows] == [0, 20, 40]
    assert float(rows[0][1]) > float(rows[1][1]) > float(rows[2][1])
    one_block = {name: ids[: 8 + 1] for name, ids in splits.items()}  # and what follows it
    gpt.learn(tiny_model(tokenizer.vocab_size), one_block, config)


@pytest.mark.parametrize("changes", [dict(optimizer="muon", dtype="bfloat16"),
                                     dict(n_layer=0, optimizer="muon")])
def test_it_learns_with_every_optimizer_dtype_and_without_attention(changes):
    losses = train_tiny(**changes, max_iters=30)["losses"]
    assert losses[30]["val"] < losses[0]["val"] - 0.05


def test_a_compiled_run_trains_the_weights_that_are_saved(monkeypatch):
    compile_nothing = torch.compile
    modes = []

    def record(model, mode):
        modes.append(mode)
        return compile_nothing(model, backend="eager")

    monkeypatch.setattr(torch, "compile", record)
    compiled = train_tiny(compile=True, out="compiled.pkl")
    assert modes == ["default"]
    assert_same_run(compiled, train_tiny())


def test_a_trained_model_is_made_of_plain_modules_and_can_be_copied_and_saved_whole():
    model = gpt.train(**TINY)
    torch.save(model, "whole.pt")
    index = torch.randint(11, (1, 8))
    expected = model(index)
    for twin in (copy.deepcopy(model), torch.load("whole.pt", weights_only=False)):
        assert_same(twin(index), expected)
        assert type(twin.tokens) is torch.nn.Embedding
        twin.tokens.weight.data.zero_()  # weights of its own
        assert not torch.equal(twin(index)[0], expected[0])
    assert_same(model(index), expected)


# -------------------------------------------------------------------------------- what a run shows

def test_one_watches_it_learn_on_one_line_an_evaluation(monkeypatch, capsys):
    monkeypatch.setattr(gpt, "sample", SAMPLE)
    model = gpt.train(**TINY)
    output = capsys.readouterr().out
    first, second, *_ = output.splitlines()
    assert re.match(r"corpus +book.txt: text, 3,\d\d\d characters, 17 different ones", first)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"book.pkl: {count:,} parameters, at step 0 of 6, on cpu in float32" in second
    steps = re.findall(r"^step +(\d)   train \d\.\d{4}   val \d\.\d{4}   (.{30,})$", output, re.M)
    assert [step for step, _ in steps] == ["0", "3", "6"]
    assert "compiles" not in output
    text, _, rest = output.rpartition("\n\nfinished at step 6; for more, raise --max_iters\n")
    assert text.endswith("\n" + SAMPLE(*gpt.load_model("book.pkl"), 500))
    assert re.fullmatch(r"kept    the weights of step 6, val \d\.\d{4}\n"
                        r"talk to it: python chat.py --model book.pkl\n", rest)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_with_loss_and_speed_is_shown_in_a_terminal_and_nowhere_else(is_terminal,
                                                                           monkeypatch, capsys):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    gpt.train(**dict(TINY, max_iters=20, grad_accum=2))
    for shown in ("loss=", "char/s", "1280/1280"):  # 20 steps of 2 batches of 4 texts of 8
        assert (shown in stream.getvalue()) == is_terminal
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_iters", [6, 4])
def test_a_finished_run_has_no_bar(max_iters, trained, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    gpt.train(**dict(TINY, max_iters=max_iters))
    assert "finished at step 6" in stream.getvalue() and "char/s" not in stream.getvalue()


def test_the_bar_follows_a_terminal_that_is_made_narrower(monkeypatch):
    bar = Mock(wraps=gpt.tqdm)
    monkeypatch.setattr(gpt, "tqdm", bar)
    gpt.train(**dict(TINY, max_iters=0))
    assert bar.call_args.kwargs["dynamic_ncols"]


def test_the_best_loss_that_is_shown_is_that_of_the_weights_that_are_kept(trained, monkeypatch,
                                                                          capsys):
    losses = [{"train": 1.0, "val": val} for val in (1.0, 2.0, 3.0)]
    monkeypatch.setattr(gpt, "estimate_loss", Mock(side_effect=losses))
    gpt.train(**dict(TINY, init_from="book.pkl", out="tuned.pkl"))
    output = capsys.readouterr().out
    assert "kept    the weights of step 3, val 2.0000\n" in output  # the 1 was the base's


def test_what_is_shown_is_printable():
    tokenizer = CharTokenizer("\x1b\x9b\r\u202e\u2066\ud800")
    text = SAMPLE(tiny_model(tokenizer.vocab_size), tokenizer, 100)
    assert len(text) == 100
    assert set(text) <= {UNK, "\n"}
    assert gpt.printable("a\tb\né日😀\u200c") == "a\tb\né日😀\u200c"


def test_the_same_weights_show_the_same_text_without_dropout():
    tokenizer = CharTokenizer(TEXT)
    model = tiny_model(tokenizer.vocab_size, dropout=0.5)
    expected = SAMPLE(model, tokenizer, 30)
    assert SAMPLE(model.train(), tokenizer, 30) == expected


def test_what_a_run_shows_is_drawn_as_chat_draws(monkeypatch):
    draw = Mock(wraps=gpt.draw)
    monkeypatch.setattr(gpt, "draw", draw)
    tokenizer = CharTokenizer(TEXT)
    SAMPLE(tiny_model(tokenizer.vocab_size), tokenizer, 3)
    flags = chat.make_parser().parse_args([])
    for call in draw.call_args_list:
        _, temperature, top_k = call.args
        assert temperature == flags.temperature and not top_k
    assert draw.call_count == 3


def test_what_is_shown_leaves_the_run_as_it_was(monkeypatch):
    shown = train_tiny(out="shown.pkl", dropout=0.2)
    monkeypatch.setattr(gpt, "sample", lambda model, tokenizer, length: "")
    assert_same_run(shown, train_tiny(out="silent.pkl", dropout=0.2))


def test_a_terminal_without_utf_8_shows_question_marks_and_gets_each_line_at_once(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    gpt.set_up_streams()
    print("café")
    assert stream.buffer.getvalue() == b"caf?\n"


def test_a_notebooks_output_has_no_reconfigure_and_needs_none(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    gpt.set_up_streams()
    gpt.main(flags(max_iters=0))
    assert "finished at step 0" in sys.stdout.getvalue()
# -------------------------------------------------------------------------- runs and their resuming

def in_step(step_to_change, change, *arguments):
    """A training_step that does something else after one step."""
    original = gpt.training_step

    def training_step(model, optimizers, batches, config, step):
        loss = original(model, optimizers, batches, config, step)
        if step == step_to_change:
            change(*arguments)
        return loss

    return training_step


def power_cut():
    raise ZeroDivisionError


def stop_and_resume(monkeypatch, **settings):
    """The checkpoint of a run that was cut off after step 4, and carried on."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gpt, "training_step", in_step(4, power_cut))
        train_tiny(**settings)
    assert gpt.load_checkpoint("book.pkl")["step"] == 3  # the last evaluation
    return train_tiny(**settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(optimizer, monkeypatch):
    settings = dict(optimizer=optimizer, dropout=0.2, grad_accum=2, max_iters=8)
    whole = train_tiny(**settings, out="whole.pkl")
    assert_same_run(whole, stop_and_resume(monkeypatch, **settings))


class Tied(gpt.GPT):
    """A fork whose last layer is its embedding."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.lm_head.weight = self.tokens.weight


def sgd(model, config):
    return [torch.optim.SGD(model.parameters(), config.learning_rate, momentum=0.9)]


@pytest.mark.parametrize("name, change", [("GPT", Tied), ("make_optimizers", sgd)])
def test_a_fork_carries_on_and_fine_tunes_what_it_saved(name, change, monkeypatch):
    monkeypatch.setattr(gpt, name, change)
    whole = train_tiny(max_iters=8, out="whole.pkl")
    assert_same_run(whole, stop_and_resume(monkeypatch, max_iters=8))
    tuned = train_tiny(init_from="book.pkl", out="tuned.pkl", max_iters=0)
    assert_same(tuned["model"], whole["best"])


def test_another_seed_is_another_model():
    one = train_tiny(out="one.pkl", seed=1, max_iters=0)["model"]["lm_head.weight"]
    two = train_tiny(out="two.pkl", seed=2, max_iters=0)["model"]["lm_head.weight"]
    assert not torch.equal(one, two)


def test_python_and_the_command_line_are_one_way_in():
    model = gpt.train(**TINY)
    gpt.main(flags(out="main.pkl"))
    saved = gpt.load_checkpoint("main.pkl")
    assert_same_run(saved, gpt.load_checkpoint("book.pkl"))
    assert_same(dict(model.state_dict()), dict(saved["best"]))
    assert not model.training


def test_a_setting_is_what_was_given_or_else_what_the_checkpoint_says(trained):
    gpt.main("--data book.txt --device cpu --max_iters 7".split())
    saved = gpt.load_checkpoint("book.pkl")
    assert saved["step"] == 7
    assert saved["config"] == dict(TINY, max_iters=7, out="book.pkl", init_from="", grad_accum=1,
                                   optimizer="adamw", learning_rate=3e-3, weight_decay=0.2,
                                   grad_clip=1.0, seed=1337, dtype="float32", compile=False)
    config, _, _ = gpt.choose_settings(dict(data="book.txt", device="cuda"))
    assert (config.n_embd, config.max_iters) == (16, 7)  # not what suits a GPU


def test_of_the_machine_nothing_comes_from_the_checkpoint(trained, monkeypatch):
    monkeypatch.setattr(torch, "load", Mock(wraps=torch.load))
    checkpoint = gpt.load_checkpoint("book.pkl")
    checkpoint["config"].update(device="mps", dtype="bfloat16", compile=True, out="elsewhere.pkl")
    torch.save(checkpoint, "book.pkl")
    config, _, _ = gpt.choose_settings(dict(data="book.txt", device="cpu"))
    assert config.device == "cpu"
    assert config.dtype == "float32"
    assert config.compile is False
    assert config.out == "book.pkl"
    model, _ = gpt.load_model("book.pkl")
    assert torch.load.call_args.kwargs["map_location"] == "cpu"  # whatever it was saved on
    assert model.config.device == "cpu"
    with pytest.raises(ValueError, match="mps: this machine"):
        gpt.load_model("book.pkl", "mps")


@pytest.mark.parametrize("data, out", [("", "model.pkl"), ("sub/book.tar.txt", "book.tar.pkl"),
                                       ("latest.txt", "latest.pkl"), ("sub/..", "texts.pkl")])
def test_a_checkpoint_is_named_after_the_data_as_it_was_typed(data, out, monkeypatch):
    Path("texts").mkdir()
    monkeypatch.chdir("texts")
    Path("latest.txt").symlink_to("book.txt")
    config, _, _ = gpt.choose_settings(dict(data=data))
    assert config.out == out


@pytest.fixture
def signals_caught():
    """As in python gpt.py."""
    before = signal.getsignal(signal.SIGTERM)
    gpt.catch_signals()
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("step", [5, 6])
def test_asked_to_stop_it_ends_the_step_saves_trained_weights_and_carries_on(step, monkeypatch,
                                                                            capsys, signals_caught):
    settings = dict(max_iters=8, eval_interval=6, dropout=0.1)  # an evaluation is due at 6, not 5

    def ask():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(number) == gpt.ask_to_stop
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL  # a second one ends it at once

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "training_step", in_step(step - 1, ask))
        gpt.main(flags(**settings))
    output = capsys.readouterr().out
    assert f"stopped at step {step}; the same command carries on" in output
    assert "kept " not in output  # the latest weights were not evaluated
    assert "python chat.py --model book.pkl\n" in output
    saved = gpt.load_checkpoint("book.pkl")
    assert saved["step"] == step
    assert list(saved["losses"]) == [0]
    assert_same(saved["best"], saved["model"])
    gpt.STOP.clear()
    gpt.main(flags(**settings))
    gpt.main(flags(**settings, out="whole.pkl"))
    assert_same_run(gpt.load_checkpoint("book.pkl"), gpt.load_checkpoint("whole.pkl"))


def test_a_process_that_gets_ctrl_c_ends_well():
    process = start("gpt.py", flags(max_iters=3000, eval_interval=3000, n_layer=1))
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
    assert "the same command carries on" in output


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    before = signal.getsignal(signal.SIGTERM)
    gpt.catch_signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    taken = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGTERM, before)
    assert taken == [gpt.ask_to_stop, gpt.ask_to_stop, signal.SIG_IGN]


def test_in_a_notebook_the_signals_stay_as_they_are(monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    gpt.train(**TINY)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_tune_that_gets_ctrl_c_ends_at_once():
    process = start("gpt.py", [*flags(batch_size=512, n_layer=20, n_embd=64), "--tune"])
    process.stdout.readline()  # the first trial is done
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize("name, world, words", [("train", 2, []), ("tune", 1, ["--tune"])])
def test_ctrl_c_ends_several_processes_and_tune_at_once(name, world, words, monkeypatch, capsys):
    def work(**settings):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it goes on")

    monkeypatch.setattr(gpt, "WORLD", world)
    monkeypatch.setattr(gpt, name, work)
    with pytest.raises(SystemExit) as stop:
        gpt.main(words)
    assert stop.value.code == 130  # what a shell expects
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_iters", [6, 4])
def test_a_finished_run_says_so_and_its_file_is_not_touched(trained, max_iters, capsys):
    before = files_in()
    gpt.main(flags(max_iters=max_iters))
    output = capsys.readouterr().out
    assert f"at step 6 of {max_iters}" in output
    assert "finished at step 6; for more, raise --max_iters" in output
    assert files_in() == before


def train_with_val_losses(monkeypatch, losses, **changes):
    """A checkpoint whose evaluations gave these validation losses."""
    rows = [{"train": 1.0, "val": loss} for loss in losses]
    monkeypatch.setattr(gpt, "estimate_loss", Mock(side_effect=rows))
    return train_tiny(**changes)


@pytest.mark.parametrize("losses, best", [([3.0, 1.0, 2.0], 1), ([1.0, 3.0, 2.0], 2)])
def test_of_a_text_the_trained_weights_with_the_lowest_val_are_kept(losses, best, monkeypatch,
                                                                  capsys):
    settings = dict(max_iters=2, eval_interval=1)
    saved = train_with_val_losses(monkeypatch, losses, **settings)
    output = capsys.readouterr().out
    assert f"kept    the weights of step {best}, val {losses[best]:.4f}\n" in output
    model, tokenizer = gpt.load_model("book.pkl")
    weights = dict(model.state_dict())
    assert_same(weights, dict(saved["best"]))
    assert torch.equal(weights["lm_head.weight"], saved["model"]["lm_head.weight"]) == (best == 2)
    assert not model.training
    assert tokenizer.chars == saved["chars"]
    assert model.config.n_embd == 16
    again = gpt.train(**dict(TINY, **settings))  # the finished run, once more
    assert_same(dict(again.state_dict()), weights)


def test_stopped_later_the_best_weights_are_still_those_of_an_evaluation(monkeypatch):
    monkeypatch.setattr(gpt, "training_step", in_step(4, gpt.STOP.append, signal.SIGINT))
    saved = train_with_val_losses(monkeypatch, [3.0, 1.0])
    assert saved["step"] == 5
    assert not torch.equal(saved["best"]["lm_head.weight"], saved["model"]["lm_head.weight"])


def test_of_pairs_the_latest_weights_are_kept(monkeypatch):
    Path("pairs.jsonl").write_text(pair("the cat", "sat") * 20)
    saved = train_with_val_losses(monkeypatch, [3.0, 1.0, 2.0], data="pairs.jsonl")
    assert_same(saved["best"], saved["model"])


def test_fine_tuning_starts_from_the_best_weights_and_the_architecture(monkeypatch):
    losses = [3.0, 1.0, 2.0, 2.0]  # the last one is for the run that starts from the base
    saved = train_with_val_losses(monkeypatch, losses, out="base.pkl", n_embd=32)
    Path("other.txt").write_text(TEXT[:500].replace("a", "é"))
    model = gpt.train(init_from="base.pkl", data="other.txt", max_iters=0, device="cpu")
    config = model.config
    assert (config.n_embd, config.n_head, config.n_layer, config.block_size) == (32, 2, 2, 8)
    assert config.eval_interval == Config.eval_interval  # nothing else is handed down
    tuned = gpt.load_checkpoint("other.pkl")
    assert_same(tuned["model"], saved["best"])
    assert tuned["chars"] == saved["chars"]
    assert tuned["step"] == 0


# ------------------------------------------------------------------------------- saving and dying

def test_a_save_is_on_the_disk_before_it_takes_the_files_place(monkeypatch):
    events = []
    fsync = os.fsync
    rename = Path.replace

    def record_fsync(number):
        events.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def record_rename(path, target):
        events.append(("rename", path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_rename)
    train_tiny(max_iters=0)
    size = Path("book.pkl").stat().st_size
    assert events == [("fsync", size), ("rename", size)]


class Killed(BaseException):
    """No "except" of ours takes this, so that a program ends where it is raised, as with a kill."""


@pytest.mark.parametrize("place", ["inside", "before", "after"])
def test_killed_within_a_save_the_run_ends_as_if_it_had_not_been(place, monkeypatch):
    settings = dict(max_iters=12, eval_interval=2, dropout=0.1)
    last = random.Random(place).randint(2, 6)  # the save in which it is killed
    save = torch.save
    rename = Path.replace
    done = []

    def dying_save(checkpoint, file):
        save(checkpoint, file)
        done.append(file)
        if place == "inside" and len(done) == last:
            file.truncate(5000)
            raise Killed

    def dying_rename(path, target):
        if place == "before" and len(done) == last:
            raise Killed
        rename(path, target)
        if place == "after" and len(done) == last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", dying_save)
        patch.setattr(Path, "replace", dying_rename)
        train_tiny(**settings)
    steps = 2 * (last - 1)  # the first save is that of step 0
    if place != "after":
        steps -= 2
    assert gpt.load_checkpoint("book.pkl")["step"] == steps
    assert_same_run(train_tiny(**settings), train_tiny(**settings, out="whole.pkl"))


def test_killed_at_any_instant_the_run_ends_as_if_it_had_not_been():
    settings = dict(max_iters=40, eval_interval=2, eval_iters=1, n_layer=1, dropout=0.1)
    for _ in range(int(os.environ.get("KILLS", 1))):
        process = start("gpt.py", flags(**settings))
        process.stdout.readline()  # it has begun
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.communicate()
        if Path("book.pkl").exists() and gpt.load_checkpoint("book.pkl")["step"] == 40:
            Path("book.pkl").unlink()  # it had ended: from the start again
    assert_same_run(train_tiny(**settings), train_tiny(**settings, out="whole.pkl"))


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(trained):
    half = Path("book.pkl").stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))  # a longer file cannot be written
    try:
        assert_refused(gpt.main, flags(max_iters=9), "book.pkl: not saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_link_is_written_through():
    Path("disk").mkdir()
    Path("link.pkl").symlink_to("disk/target.pkl")
    train_tiny(out="link.pkl", max_iters=3)
    train_tiny(out="link.pkl")
    assert Path("link.pkl").is_symlink()
    assert gpt.load_checkpoint("disk/target.pkl")["step"] == 6
    assert sorted(os.listdir()) == ["book.txt", "disk", "link.pkl"]


@pytest.mark.parametrize("out", ["nowhere/model.pkl", "book.txt/model.pkl", "link.pkl"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_computed(out, monkeypatch):
    Path("link.pkl").symlink_to("nowhere/model.pkl")
    monkeypatch.setattr(gpt, "load_data", Mock())
    assert_refused(gpt.main, flags(out=out), f"{out} cannot be saved: there is no folder")
    assert not gpt.load_data.called


def test_a_new_run_leaves_a_file_alone_that_has_appeared_since_it_began(monkeypatch, capsys):
    def evaluate(*arguments):
        Path("book.pkl").write_text("another run's model")
        return {"train": 1.0, "val": 1.0}

    monkeypatch.setattr(gpt, "estimate_loss", evaluate)
    with pytest.raises(SystemExit) as stop:
        gpt.main(flags())
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, "book.pkl", "--out")
    assert files_in() == {"book.txt": TEXT.encode(), "book.pkl": b"another run's model"}


def test_a_run_that_has_saved_does_not_mind_if_its_file_is_touched(trained, monkeypatch):
    for steps in (6, 4):  # one that carries on, and a new one
        monkeypatch.setattr(gpt, "training_step", in_step(steps, os.utime, "book.pkl", (0, 0)))
        assert train_tiny(max_iters=9)["step"] == 9
        Path("book.pkl").unlink()


def spoil(model, optimizers, batches, config, step):
    """A training_step after which one weight is no number."""
    model.lm_head.bias.data[0] = math.nan
    return torch.zeros(())


@pytest.mark.parametrize("stop_after, found_at", [(99, "step 9"), (7, "step 8")])
def test_weights_that_are_no_numbers_are_never_saved(trained, stop_after, found_at, monkeypatch,
                                                     signals_caught):
    monkeypatch.setattr(gpt, "training_step", spoil)
    stopping = in_step(stop_after, signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(gpt, "training_step", stopping)
    assert_refused(gpt.main, flags(max_iters=9), found_at, "--learning_rate")


# ------------------------------------------------------------------------------ foreign checkpoints

class Bomb:
    """A pickle that makes a file when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


# Where in a checkpoint something is put that does not belong there; REMOVED takes it out.
REMOVED = object()
OF_THE_MODEL = [
    (("config",), REMOVED), (("chars",), REMOVED), (("model",), REMOVED), (("best",), REMOVED),
    (("model", "tokens.weight"), REMOVED), (("corpus",), REMOVED), (("step",), REMOVED),
    (("losses",), REMOVED), (("optimizer",), REMOVED),
    (("best", "x"), torch.zeros(1)),
    (("model", "tokens.weight"), torch.zeros(1, 16)),
    (("best", "tokens.weight"), torch.zeros(1, 16)),
    (("best", "tokens.weight"), torch.zeros(17, 16).to_sparse()),
    (("best",), {}),
    (("model", "lm_head.bias"), torch.full((17,), math.nan)),
    (("best", "lm_head.bias"), torch.full((17,), math.inf)),
    (("chars",), CharTokenizer(TEXT).chars[::-1]),
    (("step",), Bomb()),
    (("config", "n_head"), "x"),
    (("config", "n_embd"), 32),
]
OF_THE_OPTIMIZER = [
    (("optimizer",), []),
    (("optimizer", 0), 1),
    (("optimizer", 0, 0, "exp_avg"), 1.0),
    (("optimizer", 0, 0, "exp_avg"), torch.zeros(18, 16)),
    (("optimizer", 0, 0, "exp_avg"), torch.zeros(16, 17)),
    (("optimizer", 0, 0, "exp_avg"), torch.zeros(16, 17).T),  # its numbers are in another order
    (("optimizer", 0, 0, "step"), torch.zeros(2)),
]
NO_CHECKPOINTS = [b"", b"x" * 5000, TEXT.encode(), pickle.dumps(Bomb()), pickle.dumps({})]
CUT_OFF = [0.5, 0.999]


def doctored(data, path, value):
    """The bytes of a checkpoint after one change."""
    checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    place = checkpoint
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def damaged(finished_run):
    """The bytes of files that are no good checkpoints, in the order of the lists above."""
    contents = [doctored(finished_run, *change) for change in OF_THE_MODEL]
    contents += NO_CHECKPOINTS
    contents += [finished_run[: int(share * len(finished_run))] for share in CUT_OFF]
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(1, 1), buffer)  # another program's file
    contents.append(buffer.getvalue())
    return contents


NUMBER_OF_DAMAGED = len(OF_THE_MODEL) + len(NO_CHECKPOINTS) + len(CUT_OFF) + 1


def assert_all_refuse(message):
    """Whoever reads bad.pkl says this about it, in one line, and changes no file."""
    assert_refused(gpt.main, flags(out="bad.pkl", max_iters=7), message)
    assert_refused(gpt.main, flags(init_from="bad.pkl", out="new.pkl"), message)
    assert_refused(chat.main, ["--model", "bad.pkl", "--prompt", "a"], message)


@pytest.mark.parametrize("number", range(NUMBER_OF_DAMAGED))
def test_a_strangers_file_is_refused_in_one_line_and_nothing_of_it_runs(number, damaged, recwarn):
    Path("bad.pkl").write_bytes(damaged[number])
    assert_all_refuse("bad.pkl is no checkpoint of gpt.py, or it is damaged")
    assert not recwarn.list  # torch's words about foreign files stay away


@pytest.mark.parametrize("path, value", [(("config", "x"), 1), (("config", "seed"), REMOVED)])
def test_a_file_with_other_settings_is_called_that_of_another_version(path, value, finished_run):
    Path("bad.pkl").write_bytes(doctored(finished_run, path, value))
    assert_all_refuse("bad.pkl was made by another version of gpt.py")


def test_a_changed_byte_is_noticed_wherever_it_is(finished_run):
    saved = torch.load(io.BytesIO(finished_run), weights_only=True)
    weights = saved["model"]["lm_head.bias"].numpy().tobytes()  # they are in "best" as well
    average = saved["optimizer"][0][0]["exp_avg"].numpy().tobytes()
    seed = b"M" + (1337).to_bytes(2, "little")  # as a pickle writes it
    places = {finished_run.index(weights), finished_run.rindex(weights),
              finished_run.index(average), finished_run.index(seed) + 1}
    assert len(places) == 4
    for place in places:
        content = bytearray(finished_run)
        content[place] ^= 1
        Path("bad.pkl").write_bytes(content)
        assert torch.load("bad.pkl", weights_only=True)["step"] == 6  # PyTorch does not look
        assert_all_refuse("bad.pkl is no checkpoint of gpt.py, or it is damaged")


def test_attributes_of_a_part_are_noticed_which_no_checksum_covers(finished_run):
    content = bytearray(finished_run)
    entry = content.index(b"PK\x01\x02")  # where the zip's list of parts begins
    content[entry + 41] = 1  # a file permission, which PyTorch does not look at
    Path("bad.pkl").write_bytes(content)
    assert torch.load("bad.pkl", weights_only=True)["step"] == 6
    assert_all_refuse("bad.pkl is no checkpoint of gpt.py, or it is damaged")


def test_the_sizes_that_a_file_names_cost_no_memory(finished_run, monkeypatch):
    devices = []

    class Watched(gpt.GPT):
        def __init__(self, config, vocab_size):
            super().__init__(config, vocab_size)
            devices.extend(parameter.device.type for parameter in self.parameters())

    monkeypatch.setattr(gpt, "GPT", Watched)
    Path("bad.pkl").write_bytes(doctored(finished_run, ("config", "n_embd"), 512))
    with pytest.raises(ValueError, match="bad.pkl is no checkpoint"):
        gpt.load_model("bad.pkl")
    assert set(devices) == {"meta"}  # where tensors have no numbers


@pytest.mark.parametrize("path, value", OF_THE_OPTIMIZER)
def test_a_damaged_optimizer_is_refused_where_it_is_needed(path, value, finished_run):
    Path("bad.pkl").write_bytes(doctored(finished_run, path, value))
    message = "bad.pkl: what its optimizer kept does not fit the model"
    assert_refused(gpt.main, flags(out="bad.pkl", max_iters=7), message)
    gpt.load_model("bad.pkl")
# ---------------------------------------------------------------------------------------- mistakes

# One command line each, and what the message must name. The sizes of TINY are added.
MISTAKES = [
    ("book.txt", "book.txt"), ("--n_emb 16", "--n_emb"), ("--n_embd x", "n_embd"),
    ("--n_layer 1.5", "n_layer:.*1.5"), ("--n_embd 0", "n_embd must be from 1"),
    ("--n_embd 15", "n_embd 15 must be divisible by n_head 2"),
    ("--block_size 5000", "book.txt: too short:.*block_size, 5000"),
    ("--out .", "."), ("--out nowhere/new.pkl", "nowhere/new.pkl cannot be saved: there is no"),
    ("--out book.txt", "book.txt is no checkpoint"),
    ("--init_from nothing.pkl", "nothing.pkl"), ("--init_from latin.txt", "latin.txt is no"),
    ("--init_from older.pkl", "older.pkl was made by another version"),
    ("--data nothing.txt", "nothing.txt"), ("--data empty.txt", "empty.txt: too short"),
    ("--data nul.txt", "nul.txt, line 2: this is not text.*prepare_owt.py"),
    ("--data latin.txt", "latin.txt, line 1:.*save it as UTF-8"),
    ("--data folder", "folder: neither .txt files nor the vocab.json"),
    ("--data empty.jsonl", "empty.jsonl: at least two pairs"),
    ("--data one.jsonl", "one.jsonl: at least two pairs"),
    ("--data bad.jsonl", "bad.jsonl, line 4: this is no JSON object, one for each pair: {"),
    ("--data deep.jsonl", "deep.jsonl, line 1: this is no JSON object"),
    ("--data list.jsonl", "list.jsonl, line 1: this is no JSON object, one for each pair: [1]"),
    ("--data keys.jsonl", "keys.jsonl, line 1:.*its names are: text, label"),
    ("--data no_keys.jsonl", "no_keys.jsonl, line 1:.*its names are: none"),
    ("--data number.jsonl", "number.jsonl, line 1: completion must be a text, not 4"),
]
BAD_FILES = {
    "empty.txt": "", "nul.txt": "a\n\0", "latin.txt": "\udce9", "folder/train.bin": "",
    "empty.jsonl": "\n", "one.jsonl": pair("a", "b"), "bad.jsonl": pair("a", "b") * 2 + "\n{",
    "deep.jsonl": "[" * 100_000, "list.jsonl": "[1]\n", "keys.jsonl": '{"text": "a", "label": 1}',
    "no_keys.jsonl": "{}", "number.jsonl": '{"prompt": "2+2", "completion": 4}',
}


@pytest.fixture
def bad_files():
    for name, content in BAD_FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, "utf-8", errors="surrogateescape")
    torch.save({"config": {"n_embd": 16}}, "older.pkl")  # when it had but one setting


@pytest.mark.parametrize("words, named", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(words, named, bad_files):
    assert_refused(gpt.main, [*flags(), *words.split()], *named.split(".*"))


@pytest.mark.parametrize("error, is_meant", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might come later"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried 9 bytes."), True),
    (MemoryError(), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x4)"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_too_little_memory_is_known_by_anybodys_words_for_it(error, is_meant):
    assert gpt.is_out_of_memory(error) == is_meant


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")


@pytest.mark.parametrize("place", ["read_text", "build", "training_step"])
def test_out_of_memory_is_one_line_with_advice_that_helps(place, trained, monkeypatch):
    monkeypatch.setattr(gpt, place, Mock(side_effect=FULL))
    advice = "smaller block_size, n_embd or n_layer; for a text that is too large, prepare_owt.py"
    words = flags(max_iters=9, batch_size=2, grad_accum=2)
    assert_refused(gpt.main, words, f"try --batch_size 1 --grad_accum 4, then {advice}")
    words = flags(max_iters=9, batch_size=1, grad_accum=4)
    assert_refused(gpt.main, words, f"out of memory: try {advice}")


def test_too_little_memory_for_what_a_checkpoint_holds_is_not_taken_for_damage(trained,
                                                                               monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "load_state_dict", Mock(side_effect=FULL))
        assert_refused(gpt.main, flags(max_iters=9), "out of memory: try --batch_size 2")
    monkeypatch.setattr(torch, "load", Mock(side_effect=FULL))
    assert_refused(gpt.main, flags(max_iters=9), "book.pkl does not fit in memory")


def test_a_compiler_that_fails_is_one_line_that_says_no_compile(trained, monkeypatch):
    error = torch._dynamo.exc.InternalTorchDynamoError("no compiler here\nat all")
    monkeypatch.setattr(gpt, "training_step", Mock(side_effect=error))
    words = [*flags(max_iters=9), "--compile"]
    assert_refused(gpt.main, words, "--no-compile", "no compiler here at all")


def test_an_error_of_ours_is_not_disguised(monkeypatch):
    monkeypatch.setattr(gpt, "training_step", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        gpt.main(flags())


@pytest.mark.parametrize("script", ["gpt.py", "chat.py", "prepare_owt.py"])
def test_help_needs_no_docstrings_which_python_OO_leaves_out(script, monkeypatch, capsys):
    module = type(gpt)("without_docstrings")
    module.__file__ = str(HERE / script)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclass looks for it
    source = Path(module.__file__).read_text(encoding="utf-8")
    exec(compile(source, module.__file__, "exec", optimize=2), module.__dict__)
    assert module.__doc__ is None
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "--seed" in capsys.readouterr().out


# What makes a run what it is: a setting, and another value than that of the run in trained.
FIXED = dict(n_embd=32, n_layer=1, n_head=4, block_size=4, dropout=0.3, optimizer="muon",
             learning_rate=0.5, weight_decay=0.9, warmup_iters=1, grad_clip=2.0, seed=5,
             init_from="book.pkl")
# What may differ when it carries on. (Another name for the same text, and the same number of texts
# in a step.)
FREE = dict(data="copy.txt", out="book.pkl", device="cuda", dtype="bfloat16", compile=True,
            max_iters=9, eval_interval=2, eval_iters=3, batch_size=2, grad_accum=2)


@pytest.mark.parametrize("name", FIXED)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(trained, name):
    given = {name: FIXED[name]}
    named = f"book.pkl was trained with {name} {getattr(tiny(), name)!r}, not {FIXED[name]!r}"
    advice = "another --out (and --init_from book.pkl"
    assert_refused(gpt.main, flags(**given), named, advice)  # though the run is finished
    assert_refused(gpt.main, flags(**given, max_iters=9), named, advice)
    if name in gpt.ARCHITECTURE:
        assert_refused(gpt.main, flags(**given, init_from="book.pkl", out="new.pkl"), named,
                       "drop the flag, or train a new model, without --init_from")


def test_all_flags_that_contradict_are_named_at_once(trained):
    named = ("n_layer 2, not 1", "dropout 0.0, not 0.5")
    assert_refused(gpt.main, flags(n_layer=1, dropout=0.5), *named)


def test_a_step_of_a_run_keeps_its_number_of_texts(trained):
    assert_refused(gpt.main, flags(batch_size=2), "batch_size 4, not 2")


def test_what_does_not_make_another_run_may_differ(trained, card):
    Path("copy.txt").write_text(TEXT)
    saved = train_tiny(**FREE)
    assert saved["step"] == 9
    assert list(saved["losses"]) == [0, 3, 6, 8, 9]
    assert saved["config"]["data"] == "copy.txt"


def test_each_setting_is_fixed_or_free():
    assert set(FIXED).isdisjoint(FREE)
    assert set(FIXED).union(FREE) == {field.name for field in fields(Config)}


@pytest.mark.parametrize("place", [0, len(TEXT) // 2, len(TEXT) - 1])
def test_another_text_of_the_same_length_is_refused(trained, place):
    Path("book.txt").write_text(TEXT[:place] + "c" + TEXT[place + 1 :])
    named = "book.pkl cannot carry on: book.txt has changed, or is another text"
    assert_refused(gpt.main, flags(max_iters=9), named, "another --out", "--init_from book.pkl")


def test_the_documentation_of_another_python_is_called_that(monkeypatch):
    from pydoc_data.topics import topics
    train_tiny(data="", out="model.pkl", max_iters=0)
    this = gpt.platform.python_version()
    monkeypatch.setattr(gpt.platform, "python_version", lambda: "3.99")
    monkeypatch.setitem(topics, "new", "a topic")
    named = ("model.pkl cannot carry on", f"Python {this}", "Python 3.99", "another --out")
    assert_refused(gpt.main, flags(data="", max_iters=9), *named)


def test_large_corpora_that_differ_only_late_are_told_apart():
    data = np.zeros(20_000_000, np.uint16)
    before = gpt.fingerprint({"train": data})
    data[-30_000:-10_000] = 1
    after = gpt.fingerprint({"train": data})
    assert before["train"][0] == after["train"][0] == 20_000_000
    assert before != after


def test_a_folder_with_another_vocabulary_is_refused():
    prepare_owt.main(["book.txt", "--out", "prepared"])
    Path("other.txt").write_text(TEXT + "!")
    train_tiny(data="other.txt", max_iters=0)
    named = "prepared was prepared with another vocabulary"
    assert_refused(gpt.main, flags(data="prepared", out="other.pkl", max_iters=9), named)
    assert_refused(gpt.main, flags(data="prepared", init_from="other.pkl", out="new.pkl"), named)


# -------------------------------------------------------------------------------------------- tune

def tune(monkeypatch, capsys, measure, words):
    """The rows and the last line of --tune, which measures with a function."""
    monkeypatch.setattr(gpt, "measure", measure)
    gpt.main([*words, "--tune"])
    *rows, last = capsys.readouterr().out.splitlines()
    return rows, last


@pytest.mark.parametrize("fastest", [(8, 1, "float32", False), (4, 2, "bfloat16", True),
                                     (2, 4, "bfloat16", False)])
def test_tune_ends_with_the_flags_of_the_fastest_to_add_to_ones_command(fastest, monkeypatch,
                                                                        capsys):
    def rate(config, data, vocab_size):
        trial = (config.batch_size, config.grad_accum, config.dtype, config.compile)
        return 300.0 if trial == fastest else 100.0 + config.batch_size

    before = files_in()
    words = flags(grad_accum=2)
    rows, last = tune(monkeypatch, capsys, rate, words)
    assert len(rows) == 12
    start, added = last.split(": ")
    assert start == "the fastest; add to your command"
    assert f"{added}   300 characters a second" in rows
    given = vars(gpt.make_parser().parse_args(words))
    found = vars(gpt.make_parser().parse_args([*words, *added.split()]))
    names = ("batch_size", "grad_accum", "dtype", "compile")
    assert found == dict(given, **dict(zip(names, fastest)))
    assert files_in() == before  # nothing was trained that would be kept


def test_tune_divides_a_batch_only_into_equal_parts_and_all_are_tried(monkeypatch, capsys):
    rate = Mock(return_value=1.0)
    rows, _ = tune(monkeypatch, capsys, rate, flags(batch_size=6))
    assert len(rows) == 8
    trials = set()
    for call in rate.call_args_list:
        config = call.args[0]
        assert config.batch_size * config.grad_accum == 6
        trials.add((config.batch_size, config.dtype, config.compile))
    assert len(trials) == 8


def test_tune_measures_the_run_that_would_carry_on_or_start_from_a_checkpoint(trained, monkeypatch,
                                                                              capsys):
    """Otherwise the flags that it recommends would not fit that run."""
    rate = Mock(return_value=1.0)
    tune(monkeypatch, capsys, rate, ["--data", "book.txt", "--device", "cpu"])
    words = ["--data", "book.txt", "--device", "cpu", "--init_from", "book.pkl", "--out", "new.pkl"]
    tune(monkeypatch, capsys, rate, words)
    configs = [call.args[0] for call in rate.call_args_list]
    assert {config.n_embd for config in configs} == {16}
    totals = {config.batch_size * config.grad_accum for config in configs}
    assert totals == {4, Config.batch_size}  # the checkpoint's, and the default of a new run
    assert_refused(gpt.main, [*flags(n_embd=32), "--tune"], "n_embd 16, not 32", "another --out")


def test_tune_shows_why_a_setting_failed_and_goes_on(monkeypatch, capsys):
    rates = [RuntimeError("no compiler\nhere"), torch.OutOfMemoryError("full"), 7.0, 5.0] * 3
    rows, last = tune(monkeypatch, capsys, Mock(side_effect=rates), flags())
    assert rows[0].endswith("failed: no compiler here")
    assert rows[1].endswith("failed: full")
    assert rows[2].endswith("   7 characters a second")
    assert "--dtype bfloat16 --no-compile" in last


def test_tune_that_cannot_recommend_anything_is_one_line(monkeypatch):
    monkeypatch.setattr(gpt, "measure", Mock(side_effect=RuntimeError("full")))
    assert_refused(gpt.main, [*flags(), "--tune"], "no setting could be trained")
    monkeypatch.setattr(gpt, "WORLD", 2)
    assert_refused(gpt.main, [*flags(), "--tune"], "--tune", "torchrun")


def test_a_trial_starts_clean_and_counts_the_fastest_of_its_steps(monkeypatch):
    events = Mock()
    monkeypatch.setattr(torch.compiler, "reset", events.reset)
    monkeypatch.setattr(gpt, "build", events.build)
    events.build.return_value = (None, [], None)
    loss = Mock()
    monkeypatch.setattr(gpt, "training_step", lambda *arguments: loss)
    clock = Mock(side_effect=[0, 9, 10, 14, 20, 22, 30, 33, 40, 43, 50, 53])
    monkeypatch.setattr(time, "perf_counter", clock)
    rate = gpt.measure(tiny(grad_accum=3), np.arange(1000), 11)
    assert rate == 4 * 3 * 8 / 2
    assert [call[0] for call in events.mock_calls] == ["reset", "build"]
    assert loss.item.call_count == 6  # a GPU has done its step only when its loss is there


def test_a_trial_trains_a_model_for_real():
    splits, tokenizer = gpt.load_data(tiny())
    assert gpt.measure(tiny(), splits["train"], tokenizer.vocab_size) > 0


# ------------------------------------------------------------------------------- several processes

# Each process has a folder of its own, as if it were a machine: it trains, and then carries on.
MACHINE = """
import os, sys, gpt
os.chdir("machine" + os.environ["RANK"])
gpt.main([*sys.argv[1:], "--max_iters", "6"])
gpt.main([*sys.argv[1:], "--max_iters", "12"])
"""


def test_two_processes_train_what_one_trains_and_carry_on_from_the_disk_of_process_0():
    settings = dict(grad_accum=4, dropout=0.3)
    for machine in (Path("machine0"), Path("machine1")):
        machine.mkdir()
        (machine / "book.txt").write_text(TEXT)
    Path("machine.py").write_text(MACHINE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [sys.executable, *torchrun, "machine.py", *flags(**settings)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120,
                             env=dict(os.environ, PYTHONPATH=str(HERE)))
    assert process.returncode == 0, process.stderr
    for line in ("step      0 ", "step      6 ", "step     12 "):
        assert process.stdout.count(line) == 1  # one of them prints, and nothing is done twice
    assert list(files_in("machine1")) == ["machine1/book.txt"]  # one of them saves
    train_tiny(**settings)
    one = train_tiny(**settings, max_iters=12)
    two = gpt.load_checkpoint("machine0/book.pkl")
    for name, weight in one["model"].items():  # sums are added up in another order
        torch.testing.assert_close(two["model"][name], weight, atol=1e-4, rtol=0)


def test_a_process_takes_what_process_0_has_found_and_does_not_look_at_its_own_disk(monkeypatch):
    def broadcast(found, device):
        assert device.type == "cpu"  # where a checkpoint was read
        found[:] = [{"step": 3}]

    Path("book.pkl").write_text("no checkpoint")
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(gpt, "WORLD", 2)
    monkeypatch.setattr(gpt, "RANK", 1)
    assert gpt.find_checkpoint("book.pkl") == {"step": 3}


def test_micro_batches_must_be_divisible_by_the_processes(monkeypatch):
    monkeypatch.setattr(gpt, "WORLD", 2)
    monkeypatch.setattr(gpt, "join_processes", lambda: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *words, **options: None)
    with pytest.raises(ValueError, match="grad_accum 3 .* 2 processes"):
        gpt.train(**dict(TINY, grad_accum=3))


# ------------------------------------------------------------------------------------------- a GPU

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def as_before():
    """Gives global settings back, which a run on a GPU changes, and no other run."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(True)


class Card:
    """A GPU that is not there. Only gpt.py sees it: what it calls torch is this object, which has
    the parts of torch that speak of a card, and hands out torch's own for all others. PyTorch sees
    no card, so that it does not matter what a build of it would ask of one. What is moved to the
    card stays where it is, and is written down."""

    def __init__(self, monkeypatch):
        self.cuda = Mock(spec=torch.cuda)  # it has the names that torch.cuda has, and no others
        self.cuda.is_available.return_value = True
        self.cuda.device_count.return_value = 1
        self.cuda.get_device_name.return_value = "a fake card"
        self.cuda.max_memory_allocated.return_value = 2**29
        self.autocasts = set()  # the devices of torch.autocast
        self.modes = []         # of torch.compile
        self.moved = []         # (shape, options) of ids that were moved to the card
        self.pinned = 0
        self.to_elsewhere = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "to",
                            lambda *args, **options: self.move(*args, **options))

    def __getattr__(self, name):
        return getattr(torch, name)

    def autocast(self, device, dtype, enabled):
        self.autocasts.add(device)
        return torch.autocast("cpu", dtype, enabled=enabled)

    def compile(self, model, mode):
        self.modes.append(mode)
        return model

    def pin(self, tensor):
        self.pinned += 1
        return tensor

    def move(self, tensor, *args, **options):
        if not args or not str(args[0]).startswith("cuda"):
            return self.to_elsewhere(tensor, *args, **options)
        if tensor.dtype == torch.int64:
            self.moved.append((tuple(tensor.shape), options))
        return tensor


@pytest.fixture
def card(monkeypatch, as_before):
    card = Card(monkeypatch)
    monkeypatch.setattr(gpt, "torch", card)
    return card


@pytest.mark.parametrize("grad_accum, mode", [(1, "reduce-overhead"), (2, "default")])
def test_a_run_on_cuda_pins_its_batches_and_compiles_as_fits(grad_accum, mode, card, capsys):
    settings = dict(TINY, device="cuda", dtype="bfloat16", compile=True, grad_accum=grad_accum)
    gpt.train(**settings)
    output = capsys.readouterr().out
    assert card.modes == [mode]
    batches = 6 * grad_accum + 3 * 4  # steps, and three evaluations of two splits
    assert card.pinned == batches
    assert card.moved.count(((4, 9), {"non_blocking": True})) == batches
    assert card.autocasts == {"cuda"}
    card.cuda.set_device.assert_called_with(0)
    assert "on a fake card in bfloat16" in output
    assert "the first step compiles" in output
    assert "memory  0.50 GiB" in output
    assert gpt.load_checkpoint("book.pkl")["step"] == 6
    assert not torch.are_deterministic_algorithms_enabled()  # that is for its user to choose


@pytest.mark.parametrize("in_hardware, dtype", [(True, "bfloat16"), (False, "float32")])
@pytest.mark.parametrize("system, compiler, compiled", [
    ("linux", "/usr/bin/cc", True), ("linux", None, False), ("win32", "/usr/bin/cc", False)])
def test_on_cuda_the_defaults_are_a_larger_model(in_hardware, dtype, system, compiler, compiled,
                                                 card, monkeypatch):
    def is_supported(including_emulation=True):
        return including_emulation or in_hardware

    card.cuda.is_bf16_supported.side_effect = is_supported
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(gpt.shutil, "which", lambda name: compiler)
    config, _, _ = gpt.choose_settings(dict(data="book.txt", device="cuda", n_layer=2))
    assert (config.n_embd, config.n_head, config.block_size) == (384, 8, 256)
    assert config.n_layer == 2  # what was given comes first
    assert (config.dtype, config.compile) == (dtype, compiled)


def test_each_process_has_a_card_of_its_own_or_is_refused(card, monkeypatch):
    monkeypatch.setattr(gpt, "LOCAL_RANK", 1)
    assert_refused(gpt.main, flags(device="cuda"), "process 2", "lower --nproc_per_node")
    card.cuda.device_count.return_value = 2
    gpt.prepare_device(tiny(device="cuda"))
    card.cuda.set_device.assert_called_once_with(1)


def test_processes_with_cards_talk_through_nccl_and_about_checkpoints_through_gloo(card,
                                                                                   monkeypatch):
    start = Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    monkeypatch.setattr(gpt.atexit, "register", Mock())
    monkeypatch.setattr(gpt, "WORLD", 2)
    gpt.join_processes()
    start.assert_called_once_with("cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, trained, monkeypatch):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    assert_refused(gpt.main, flags(device=device, out="new.pkl"), f"device {device}")
    words = ["--model", "book.pkl", "--prompt", "a", "--device", device]
    assert_refused(chat.main, words, f"device {device}")


def test_tune_on_cuda_empties_the_card_before_each_trial(card, capsys):
    gpt.tune(**dict(TINY, device="cuda"))
    assert card.cuda.empty_cache.call_count == 12
    assert card.modes == ["reduce-overhead"] * 2 + ["default"] * 4
    assert "failed" not in capsys.readouterr().out


def test_chat_on_cuda_moves_what_it_reads(card, trained):
    words = ["--model", "book.pkl", "--max_new_tokens", "9", "--device", "cuda"]
    talk = chat.load(chat.make_parser().parse_args(words))
    assert len(list(talk.answer("the "))) == 9
    assert len(talk.why()) == 7
    assert card.moved == [((1, 4), {}), ((1, 7), {})]  # a block is 8 long, and the first comes free


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_float32_on_a_card_has_tensor_cores_and_no_attention_of_cudnn(name, card):
    gpt.prepare_device(tiny(device=name))
    assert torch.get_float32_matmul_precision() == {"cpu": "highest", "cuda": "high"}[name]
    assert torch.backends.cuda.cudnn_sdp_enabled() == (name == "cpu")


CARD = dict(TINY, device="cuda", batch_size=8, dropout=0.2, block_size=32, n_embd=64, max_iters=40,
            eval_interval=3)


@needs_card
@pytest.mark.parametrize("changes", [
    dict(dtype="bfloat16", compile=True), dict(dtype="bfloat16"), dict(compile=True), dict(),
    dict(dtype="bfloat16", compile=True, grad_accum=3), dict(optimizer="muon", compile=True)])
def test_on_a_card_a_killed_run_carries_on_and_learns(changes, as_before, monkeypatch):
    losses = stop_and_resume(monkeypatch, **dict(CARD, **changes))["losses"]
    assert losses[6]["val"] < losses[3]["val"] - 0.1  # after the last save before the kill, step 3
    assert losses[40]["val"] < losses[0]["val"] - 0.3


@needs_card
def test_a_checkpoint_changes_its_device(as_before):
    gpt.train(**CARD)
    settings = dict(CARD, max_iters=60, device="cpu")
    gpt.train(**settings)
    assert gpt.load_checkpoint("book.pkl")["step"] == 60
    gpt.train(**dict(settings, max_iters=80, device="cuda"))
    assert gpt.load_checkpoint("book.pkl")["step"] == 80


@needs_card
@pytest.mark.parametrize("words", [[], ["--int8"], ["--top_k", "3"]])
def test_a_card_chats_and_says_the_same_for_the_same_seed(words, as_before, capsys):
    gpt.train(**CARD)
    outputs = []
    for _ in range(2):
        capsys.readouterr()
        chat.main(["--model", "book.pkl", "--prompt", "the ", "--seed", "1", *words])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 500


@needs_card
def test_a_card_is_tuned(as_before, capsys):
    gpt.tune(**dict(CARD, batch_size=6))  # which cannot be divided by 4
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 9
    assert "failed" not in "".join(rows)
# ------------------------------------------------------------------------------- chat: a base model

@pytest.fixture
def base(finished_run):
    """model.pkl, where chat.py looks for it. Its block_size is 8."""
    Path("model.pkl").write_bytes(finished_run)


@pytest.fixture
def base_chat(base):
    """A chat with the base model, whose answers have three characters."""
    return chat.Chat(*gpt.load_model("model.pkl"), max_new_tokens=3)


def spoken(talk):
    """What a chat remembers, as text."""
    return talk.tokenizer.decode(talk.context())


def type_in(monkeypatch, text):
    """Gives input() something to read, which does not come from a terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("prompt", ["the ", ""])
def test_a_prompt_is_continued_by_as_many_characters_as_were_asked_for(prompt, base, capsys):
    chat.main(["--prompt", prompt, "--max_new_tokens", "20", "--stats"])
    output, errors = capsys.readouterr()
    assert output.startswith(prompt)
    assert len(output) == len(prompt) + 20 + len("\n")
    assert "20 characters" in errors


def test_stats_are_the_characters_and_how_many_came_in_a_second(monkeypatch, capsys):
    talk = chat_saying("abcdef")
    monkeypatch.setattr(time, "perf_counter", Mock(side_effect=[1.0, 3.0]))
    talk.show("", stats=True)
    assert "(6 characters, 3 a second)" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_text_and_another_one_another(base, capsys):
    outputs = []
    for seed in ("0", "0", "2"):
        chat.main(["--prompt", "the ", "--max_new_tokens", "20", "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


@pytest.fixture
def undecided(base):
    """model.pkl, which finds all characters equally likely."""
    saved = gpt.load_checkpoint("model.pkl")
    assert saved["chars"].startswith(END + "\n ")  # of these, END is shown as a line end
    saved["best"]["lm_head.weight"].zero_()
    saved["best"]["lm_head.bias"].zero_()
    torch.save(saved, "model.pkl")


@pytest.mark.parametrize("precision", [[], ["--int8"]])
@pytest.mark.parametrize("flag, drawn", [
    (["--temperature", "0"], "\n"), (["--top_k", "1"], "\n"), (["--top_k", "3"], "\n ")])
def test_of_equally_likely_characters_temperature_0_and_top_k_take_the_first(
        precision, flag, drawn, undecided, capsys):
    chat.main(["--prompt", "the", "--max_new_tokens", "100", "--seed", "1", *flag, *precision])
    text = capsys.readouterr().out.removeprefix("the")
    assert set(text) == set(drawn)


@pytest.fixture
def pipe(monkeypatch):
    """(end to read from, end to write to) of a pipe that is standard input, as Python opens it on
    Linux. Until a test closes it, it stays open, and more might come."""
    ends = os.pipe()
    with open(ends[0], encoding="utf-8", newline="\n") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield ends


def left_in(pipe):
    """What was written to a pipe and not read; then it is closed."""
    os.close(pipe[1])
    return os.read(pipe[0], 1000)


def run_script(monkeypatch, words):
    """Runs chat.py as a script, in this process."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *words])
    runpy.run_path(str(HERE / "chat.py"), run_name="__main__")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_into_a_pipe_goes_the_text_and_nothing_else(line_end, base, pipe, monkeypatch, capsys):
    words = ["--max_new_tokens", "20", "--seed", "1"]
    chat.main([*words, "--prompt", "the "])
    once = capsys.readouterr().out
    typed = line_end.join(["the ", "cat", "/help", "/quit", "dog", ""])
    os.write(pipe[1], typed.encode())
    os.close(pipe[1])
    run_script(monkeypatch, words)
    output, errors = capsys.readouterr()
    assert output.startswith(once + "cat")
    assert len(output) == len("the cat") + 2 * len(" " * 20 + "\n")  # no dog: /quit
    assert errors == f"model.pkl continues your text; /help\n{chat.HELP}\n"


@pytest.mark.parametrize("words, status", [("--help", 0), ("--model no.pkl", 2)])
def test_what_wants_no_line_does_not_touch_standard_input(words, status, pipe, monkeypatch):
    os.write(pipe[1], b"next\n")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, words.split())
    assert stop.value.code == status
    assert left_in(pipe) == b"next\n"


def test_with_a_prompt_an_open_pipe_is_not_waited_for_and_a_shell_loop_keeps_its_lines(base, pipe):
    """In while read -r line; do python chat.py --prompt "$line"; done < prompts.txt, both read from
    the same place, so that each line is still there for the loop if chat.py takes none."""
    os.write(pipe[1], b"next\n")
    ended = run("chat.py", ["--prompt", "the ", "--max_new_tokens", "20"], stdin=pipe[0])
    assert len(ended.stdout) == len("the ") + 20 + len("\n")
    assert left_in(pipe) == b"next\n"


def test_the_greeting_comes_before_a_line_is_read(base, pipe, monkeypatch, capsys):
    os.write(pipe[1], b"next\n")
    found = []

    def first_line(prompt):
        found.append(capsys.readouterr().err)
        found.append(left_in(pipe))
        raise EOFError
    monkeypatch.setattr("builtins.input", first_line)
    run_script(monkeypatch, [])
    assert found == ["model.pkl continues your text; /help\n", b"next\n"]


def test_a_prompt_is_cleaned_as_the_corpus_was(base_chat):
    base_chat.read(f"the\r\ncat\rsat\non{END}")
    assert spoken(base_chat) == f"the\ncat\nsat\non{UNK}"


def test_an_answer_is_shown_a_character_at_a_time(base_chat, monkeypatch):
    screen = Mock()
    monkeypatch.setattr(sys, "stdout", screen)
    base_chat.show("the")
    said = spoken(base_chat).removeprefix("the").replace(END, "\n")
    shown = []
    for char in said:
        shown += [("write", (char,)), ("flush", ())]  # print writes an empty end as well
    calls = [(name, words) for name, words, _ in screen.mock_calls if words != ("",)]
    assert calls == [*shown, ("write", ("\n",))]


def test_a_base_model_reads_the_whole_conversation(base_chat):
    base_chat.model.stream = Mock(wraps=base_chat.model.stream)
    first = "".join(base_chat.answer("the cat"))
    second = "".join(base_chat.answer("sat"))
    index = base_chat.model.stream.call_args.args[0]  # what it got for the second answer
    read = base_chat.tokenizer.decode(index[0].tolist())
    assert read.replace(END, "\n") == "the cat" + first + "sat"
    assert spoken(base_chat).replace(END, "\n") == "the cat" + first + "sat" + second


def test_at_the_prompt_ctrl_c_begins_a_new_line_and_ctrl_d_leaves(monkeypatch, capsys):
    typed = Mock(side_effect=[KeyboardInterrupt, "a", EOFError])
    monkeypatch.setattr("builtins.input", typed)
    assert list(chat.typed_lines("> ")) == ["a"]
    assert capsys.readouterr().out == "\n\n"


def test_clear_forgets_the_conversation(base_chat, monkeypatch):
    type_in(monkeypatch, "dog\n/clear\n")
    chat.talk(base_chat, stats=False)
    assert base_chat.turns == []


def test_with_an_empty_line_the_text_goes_on(base_chat, monkeypatch):
    type_in(monkeypatch, "dog\n\n")
    chat.talk(base_chat, stats=False)
    assert len(spoken(base_chat)) == len("dog") + 2 * 3


@pytest.mark.parametrize("prompt, said", [
    ("é日a", "^.*never seen: 2.*\n$"), ("éa", "^.*never seen: 1.*\n$"),
    ("the cat ", "^$"), ("the cat a", "^.*the last 8.*\n$")])
def test_what_the_model_cannot_see_of_a_prompt_is_said(prompt, said, base_chat, capsys):
    seen = []
    base_chat.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0][0]))
    base_chat.show(prompt)
    assert re.search(said, capsys.readouterr().err)
    known = prompt.replace("é", UNK).replace("日", UNK)
    assert base_chat.tokenizer.decode(seen[0].tolist()) == known[-8:]


def chat_saying(text, **changes):
    """A chat whose model says just this, whatever it reads."""
    tokenizer = CharTokenizer(text + "abcdefghijklmnop\n")
    model = Mock(config=tiny(**changes))
    model.stream.return_value = torch.tensor(tokenizer.encode(text).tolist())
    return chat.Chat(model, tokenizer)


def test_control_characters_never_reach_the_terminal(base, monkeypatch, capsys):
    chat_saying("a\x1b[2J\r\x00\x9b\u202e\n\tb é日😀 \u200c").show("")
    assert capsys.readouterr().out == f"a{UNK}[2J{UNK}{UNK}{UNK}{UNK}\n\tb é日😀 \u200c\n"
    chat.main(["--prompt", "\x1b[2J", "--max_new_tokens", "1"])
    assert capsys.readouterr().out.startswith(f"{UNK}[2J")
    type_in(monkeypatch, "\x1b[2J")
    chat.main(["--max_new_tokens", "1"])
    assert capsys.readouterr().out.startswith(f"{UNK}[2J")


@pytest.fixture
def terminal(base):
    """(process id, terminal) of chat.py in a terminal, where an answer never ends by itself."""
    process_id, terminal = pty.fork()
    if process_id == 0:  # this is the new process
        os.environ["TERM"] = "dumb"
        words = ["--max_new_tokens", "1000000000", "--seed", "1"]
        os.execv(sys.executable, [sys.executable, HERE / "chat.py", *words])
    yield process_id, terminal
    os.close(terminal)  # which ends a process that is still there


def wait_for(pattern, terminal):
    """Reads what a terminal shows until that matches a pattern; at most 60 seconds."""
    end = time.monotonic() + 60
    seen = ""
    while not re.search(pattern, seen, re.DOTALL):
        assert time.monotonic() < end, seen[-300:]
        readable, _, _ = select.select([terminal], [], [], 0.1)
        if readable:
            seen += os.read(terminal, 10000).decode("utf-8", "replace")


def wait_until(is_true):
    """Waits for something to become true; at most 60 seconds."""
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(terminal):
    process_id, terminal = terminal
    wait_for("> ", terminal)
    os.write(terminal, "the é\n".encode())
    wait_for(r"never seen: 1\).{50}", terminal)  # an answer is under way
    os.write(terminal, b"\x03")  # Ctrl-C; its ^C may come before the line end, or after
    wait_for("> ", terminal)
    os.write(terminal, b"/clear\n")
    wait_for("\n> ", terminal)
    os.write(terminal, b"\x04")  # Ctrl-D
    status = []

    def has_ended():
        ended, code = os.waitpid(process_id, os.WNOHANG)
        status.append(code)
        return ended == process_id
    wait_until(has_ended)
    assert status[-1] == 0


# ------------------------------------------------------------------- chat: a model trained on pairs

QUESTIONS = ("cat dog rat hen goat man ant ram crane toad doe stag hog horse cod hare moth gnat "
             "dam mare tern").split()
REPLIES = random.Random(1).choices(["sat", "ran", "no", "on", "a dog", "the cat"], k=21)
ANSWERS = {**PAIRS, **dict(zip(QUESTIONS, REPLIES))}
FINE_TUNE = ("--init_from base.pkl --data pairs.jsonl --device cpu --max_iters 400 "
             "--learning_rate 2e-2 --dropout 0 --batch_size 16").split()


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The folder of base.pkl, pairs.jsonl and pairs.pkl, which learned ANSWERS and sees about four
    questions with their answers; and what that training printed. The file has each pair once, and
    three more at its end, as a tenth is kept back."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    lines = [pair(*item) for item in ANSWERS.items()]
    lines += [pair("hat", "no"), pair("mat", "on"), pair("rod", "a dog")]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "book.txt").write_text(TEXT)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(gpt, "sample", Mock(return_value=""))
        gpt.train(**dict(TINY, out="base.pkl", n_embd=32, n_layer=1, block_size=40))
        patch.setattr(sys, "stdout", output)
        gpt.main(FINE_TUNE)
    return folder, output.getvalue()


@pytest.fixture
def pairs_model(fine_tuned):
    """The path of the model that was trained on ANSWERS."""
    folder, _ = fine_tuned
    return str(folder / "pairs.pkl")


@pytest.fixture
def answering(pairs_model):
    """A chat with it."""
    return chat.Chat(*gpt.load_model(pairs_model), temperature=0, max_new_tokens=50)


def test_fine_tuning_keeps_vocabulary_and_architecture_and_nothing_else(fine_tuned):
    folder, output = fine_tuned
    _, base_tokenizer = gpt.load_model(folder / "base.pkl")
    model, tokenizer = gpt.load_model(folder / "pairs.pkl")
    assert tokenizer.chars == base_tokenizer.chars
    assert model.config.n_embd == 32
    assert model.config.eval_interval == Config.eval_interval
    assert "which the model cannot tell apart: é" in output


def test_fine_tuning_refuses_another_architecture(fine_tuned, monkeypatch):
    folder, _ = fine_tuned
    monkeypatch.chdir(folder)
    words = [*FINE_TUNE, "--out", "new.pkl", "--n_layer", "2"]
    assert_refused(gpt.main, words, "n_layer 1, not 2")


def test_what_it_knows_alone_a_model_knows_in_conversation_in_whatever_order(answering):
    """If the order of a file taught which question follows which, half would be wrong here."""
    known = []
    for question, answer in ANSWERS.items():
        answering.turns = []
        if "".join(answering.answer(question)) == answer:
            known.append(question)
    assert len(known) >= 20
    answering.turns = []
    asked = random.Random(0).choices(known, k=100)
    answers = ["".join(answering.answer(question)) for question in asked]
    right = sum(answer == ANSWERS[question] for question, answer in zip(asked, answers))
    assert right >= 95


def test_turns_stand_in_the_context_as_pairs_did_in_training(answering):
    answering.show("é")
    answering.read("é")
    assert spoken(answering) == f"{END}{UNK}\ncat{END}{UNK}\n"


@pytest.mark.parametrize("prompts, read", [
    (["a", "abc"], f"{END}a\nxy{END}abc\n"),  # ten: half of what the model sees
    (["a", "abcd"], f"{END}abcd\n"),
    (["a", "b", "c"], f"{END}b\nxy{END}c\n"),
    (["a", "abcdefghijklm"], f"{END}abcdefghijklm\n")])
def test_old_turns_are_dropped_whole_until_the_rest_fills_half_of_what_is_seen(prompts, read):
    talk = chat_saying("xy" + END, data="pairs.jsonl", block_size=20)
    for prompt in prompts:
        assert "".join(talk.answer(prompt)) == "xy"
    index = talk.model.stream.call_args.args[0]
    assert talk.tokenizer.decode(index[0].tolist()) == read


@pytest.mark.parametrize("typed", [True, False])
def test_the_answers_alone_go_into_a_pipe(typed, pairs_model, monkeypatch, capsys):
    type_in(monkeypatch, "a dog\n\nthe cat\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: typed)
    chat.main(["--model", pairs_model, "--temperature", "0"])
    assert capsys.readouterr().out == "ran\nsat\n"  # an empty line is no question


def test_one_prompt_and_its_answer_stand_on_lines_of_their_own(pairs_model, capsys):
    chat.main(["--model", pairs_model, "--temperature", "0", "--prompt", "a dog"])
    assert capsys.readouterr().out == "a dog\nran\n"


# ---------------------------------------------------------------------------- chat: why, and 8 bits

NAME = r"(END|UNK|'[^']+'|'''|\"'\")"


def read_why(lines):
    """The lines of why, as a list of (id's name, share, bar, {other's name: share})."""
    rows = []
    for line in lines:
        came, others = line.split("   else  ")
        name, bar, share = re.fullmatch(rf"{NAME} +([█·]+) +([\d.]+)%", came).groups()
        found = re.findall(rf"{NAME} +([\d.]+)%", others)
        shares = {other: float(part) for other, part in found}
        rows.append((name, float(share), bar, shares))
    return rows


def as_named(char):
    return {END: "END", UNK: "UNK"}.get(char, repr(char))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_why_shows_each_character_with_its_share_and_the_four_likeliest_others(
        precision, answering):
    if precision == "int8":
        chat.quantize(answering.model)
    answering.show("é")  # some of what is explained was typed, the rest written
    answering.read("a d")
    passes = []
    answering.model.register_forward_pre_hook(lambda *inputs: passes.append(inputs))
    lines = answering.why()
    assert len(passes) == 1
    rows = read_why(lines)
    text = spoken(answering)
    chars = answering.tokenizer.chars
    logits, _ = answering.model(torch.tensor([answering.context()]))
    table = 100 * logits[0].float().softmax(dim=-1)
    assert [name for name, *_ in rows] == [as_named(char) for char in text[1:]]
    assert len({line.index("else") for line in lines}) == 1
    for place, (name, share, bar, others) in enumerate(rows):
        shares = {as_named(char): table[place, id].item() for id, char in enumerate(chars)}
        assert share == pytest.approx(shares.pop(name), abs=0.06)
        assert abs(share - 10 * bar.count("█")) < 5.1
        assert len(bar) == 10
        likeliest = sorted(shares.values(), reverse=True)[:4]
        assert list(others.values()) == pytest.approx(likeliest, abs=0.06)
        shown = {other: shares[other] for other in others}
        assert others == pytest.approx(shown, abs=0.06)


def test_why_explains_the_last_characters_that_the_model_sees(base_chat, monkeypatch, capsys):
    type_in(monkeypatch, "/why\nthe cat sat\n/why\n")
    base_chat.options = dict(max_new_tokens=1)
    chat.talk(base_chat, stats=False)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "nothing to explain yet"
    seen = spoken(base_chat)[-8:]
    assert [name for name, *_ in read_why(lines[-7:])] == [as_named(char) for char in seen[1:]]


@pytest.mark.parametrize("text, explained", [(TEXT[:40], TEXT[28:40]), (TEXT[:2], TEXT[1])])
def test_why_explains_a_dozen_characters_if_there_are_as_many(text, explained):
    tokenizer = CharTokenizer(TEXT)
    talk = chat.Chat(tiny_model(tokenizer.vocab_size, block_size=32), tokenizer)
    talk.read(text)
    assert [name for name, *_ in read_why(talk.why())] == [as_named(char) for char in explained]


@pytest.fixture(params=["fast product", "slow product"])
def product(request, monkeypatch):
    """A test runs twice: with PyTorch's product for 8 bits, and as if it had none."""
    if request.param == "slow product":
        monkeypatch.delattr(torch, "_weight_int8pack_mm")


def test_8_bits_are_at_most_half_a_scale_off_and_use_all_of_their_range():
    linear = torch.nn.Linear(64, 32)
    quantized = chat.Int8Linear(linear)
    error = quantized.weight * quantized.scale[:, None] - linear.weight
    assert (error.abs() <= 0.501 * quantized.scale[:, None]).all()
    assert (quantized.weight.abs().amax(dim=1) == 127).all()


def test_sizes_are_in_mib():
    linear = torch.nn.Linear(1024, 1024, bias=False)
    assert chat.size_of(linear) == 4
    assert chat.size_of(chat.Int8Linear(linear)) == 1 + 4 / 1024  # weights and scales


@pytest.mark.parametrize("width", [64, 36])  # 36 is no multiple of 16
def test_a_product_with_8_bits_is_nearly_that_with_32(width, product):
    linear = torch.nn.Linear(width, 32)
    x = torch.randn(2, 3, width)
    expected = linear(x)
    quantized = chat.quantize(torch.nn.Sequential(linear))
    y = quantized(x.bfloat16()).float()
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("width, is_fast", [(36, False), (48, True)])
def test_the_fast_product_gets_only_rows_that_it_does_not_read_past_the_end(width, is_fast,
                                                                           monkeypatch):
    fast = Mock(return_value=torch.zeros(3, 11))
    monkeypatch.setattr(torch, "_weight_int8pack_mm", fast)
    linear = chat.quantize(torch.nn.Sequential(torch.nn.Linear(width, 11)))
    linear(torch.randn(1, 3, width, dtype=torch.bfloat16))
    assert fast.called == is_fast


def test_with_8_bits_a_model_answers_the_same_from_a_quarter_of_the_memory(
        pairs_model, product, monkeypatch, capsys):
    outputs = []
    for precision in ([], ["--int8"]):
        type_in(monkeypatch, "\n/clear\n".join(ANSWERS))
        chat.main(["--model", pairs_model, "--temperature", "0", *precision])
        output, errors = capsys.readouterr()
        outputs.append(output)
    assert outputs[0].count("\n") == len(ANSWERS)
    assert outputs[0] == outputs[1]
    before, after = re.search(r"weights: ([\d.]+) MiB, as int8 ([\d.]+) MiB", errors).groups()
    model, _ = gpt.load_model(pairs_model)
    size = chat.size_of(model)
    int8 = chat.quantize(model)
    assert float(before) == pytest.approx(size, abs=0.06)
    assert float(after) == pytest.approx(chat.size_of(int8), abs=0.06)
    assert chat.size_of(int8) < 0.3 * size
    types = {tensor.dtype for tensor in int8.state_dict().values()}
    assert types == {torch.int8, torch.bfloat16}


# ----------------------------------------------------------------------------------- chat: mistakes

@pytest.mark.parametrize("words, named", [
    ("--model book.txt", "book.txt"),
    ("--model no.pkl", "no.pkl: no such model; python gpt.py makes one"),
    ("--temperature -1", "temperature"), ("--temperature nan", "temperature"),
    ("--top_k -1", "top_k"), ("--seed -1", "seed"), (f"--seed {2**70}", "seed"),
    ("--max_new_tokens 0", "max_new_tokens"), ("--device tpu", "tpu"), ("--mod x", "--mod")])
def test_a_mistake_in_chat_is_one_line_and_exit_status_2(words, named, base):
    assert_refused(chat.main, ["--prompt", "a", *words.split()], named)


def test_a_foreign_pickle_gets_one_line_and_no_warning_of_pytorchs(recwarn):
    Path("model.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert_refused(chat.main, ["--prompt", "a"], "model.pkl is no checkpoint of gpt.py")
    assert not recwarn.list


@pytest.mark.parametrize("place", ["load_model", "GPT.forward"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_is_one_line(place, error, base, monkeypatch):
    monkeypatch.setattr(f"gpt.{place}", Mock(side_effect=error))
    assert_refused(chat.main, ["--prompt", "a"], "out of memory: ")


def test_any_other_error_keeps_its_traceback(base, monkeypatch):
    monkeypatch.setattr(gpt.GPT, "forward", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        chat.main(["--prompt", "a"])


@pytest.mark.parametrize("place", ["gpt.load_model", "chat.quantize", "chat.talk"])
def test_ctrl_c_ends_chat_without_a_traceback_wherever_it_comes(place, base, monkeypatch):
    monkeypatch.setattr(place, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(BaseException) as stop:
        chat.main(["--int8"])
    assert stop.type is SystemExit
    assert stop.value.code == 130
# ---------------------------------------------------------------------------------- prepare_owt.py
ODD = [re.sub(f"[\r\0{END}\ufeff]", "", random_text(seed, 3000)) for seed in range(13)]
DOCUMENTS = ["one\r\ntwo\rthree\r\r\nfour", "日本語 😀 e\u0301", b"bad \xff\xe2\x82 end",
             b"\xff", f"an {END}, a {UNK}", "\ufeffmark\ufeff", "UTF-16, é".encode("utf-16"),
             b"a NUL \0", "", *ODD]
CLEANED = ["one\ntwo\nthree\n\nfour", "日本語 😀 e\u0301", f"bad {UNK}{UNK} end", UNK,
           f"an {UNK}, a {UNK}", "mark\ufeff", "UTF-16, é", "", *ODD]
NOT_READ = {"documents with a NUL": 1, "documents in part (bytes that are not UTF-8)": 2}


def tar(files, mode="w", **options):
    """The bytes of a tar of (name, text or bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for name, content in files:
            if isinstance(content, str):
                content = content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def texts(documents):
    """A list of (name, content): 0.txt, 1.txt and so on."""
    return [(f"{number}.txt", document) for number, document in enumerate(documents)]


def owt(documents, per_shard=7):
    """OpenWebText's shape: a list of (name, bytes) of shards, each a tar in an .xz."""
    shards = []
    for start in range(0, len(documents), per_shard):
        name = f"openwebtext/subset-{start}_data.xz"
        content = tar(texts(documents[start : start + per_shard]))
        shards.append((name, lzma.compress(content)))
    return shards


WHOLE = tar(owt(DOCUMENTS))


def prepare(*words):
    """Prepares, and returns the documents of both splits and corpus.json."""
    prepare_owt.main([*words, "--out", "out"])
    splits, tokenizer = gpt.load_data(tiny(data="out", block_size=1))
    train = tokenizer.decode(splits["train"]).split(END)
    val = tokenizer.decode(splits["val"]).split(END)
    corpus = json.loads(Path("out/corpus.json").read_text())
    assert train.pop() == "" and val.pop() == ""  # an END closes the last document too
    shutil.rmtree("out")  # the next preparation would not write over it
    return train, val, corpus


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """The folder that was prepared from WHOLE."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.tar").write_bytes(WHOLE)
    prepare_owt.main([str(folder / "a.tar"), "--out", str(folder / "out")])
    return folder / "out"


@pytest.fixture
def out(whole_folder):
    """A copy of it, where the next preparation would go."""
    shutil.copytree(whole_folder, "out")


SOURCES = {
    "Shards.TAR": tar(owt(DOCUMENTS, per_shard=1)),
    "original.tar.xz": lzma.compress(WHOLE),
    "shards.tgz": tar(owt(DOCUMENTS), "w:gz"),
    "texts.tar.bz2": tar(texts(DOCUMENTS), "w:bz2"),
    "outer.tar": tar([("a/inner.Tar.Gz", tar(texts(DOCUMENTS), "w:gz"))]),
    "deep.xz": lzma.compress(tar([("b/c.tar.bz2", tar(owt(DOCUMENTS), "w:bz2"))])),
    "subsets/urlsf_subset00.tar": WHOLE,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_source_comes_back_character_for_character(name):
    path = Path("openwebtext", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(SOURCES[name])
    source = path
    if path.parent.name == "subsets":  # Hugging Face's layout: the folder is named
        Path("openwebtext/README.md").write_text("# OpenWebText")
        source = "openwebtext"
    train, val, corpus = prepare(str(source))
    assert train + val == CLEANED
    assert train and val
    corpus["not_read"].pop(".md", None)
    assert corpus["not_read"] == NOT_READ


def test_corpus_json_says_what_is_in_the_folder(whole_folder):
    splits, _ = gpt.load_data(tiny(data=str(whole_folder)))
    vocabulary = (whole_folder / "vocab.json").read_bytes()
    text = "".join(CLEANED)
    assert json.loads((whole_folder / "corpus.json").read_text()) == {
        "documents": len(CLEANED), "characters": len(text), "unknown": text.count(UNK),
        "vocabulary": len(set(text) | {END, UNK}), "not_read": NOT_READ,
        "train": len(splits["train"]), "val": len(splits["val"]),
        "checksum": zlib.crc32(vocabulary)}
    assert len(splits["train"]) + len(splits["val"]) == len(text) + len(CLEANED)
    assert len(list(whole_folder.iterdir())) == 4


def test_folders_that_are_not_there_yet_are_made_and_the_last_line_trains_on_them(capsys):
    prepare_owt.main(["book.txt", "--out", "new/corpora/my book"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "train on it: python gpt.py --data 'new/corpora/my book'"
    assert os.listdir("new/corpora") == ["my book"]
    assert len(os.listdir("new/corpora/my book")) == 4


def test_any_number_of_workers_gives_the_same_files(monkeypatch):
    Path("a.tar").write_bytes(tar(owt(DOCUMENTS, per_shard=1)))
    Path("b.txt").write_text("\n".join(map(str, range(500_000))))  # of several batches
    for workers in (1, 3):
        processes = functools.partial(ProcessPoolExecutor, workers)
        monkeypatch.setattr(prepare_owt, "ProcessPoolExecutor", processes)
        prepare_owt.main(["b.txt", "a.tar", "b.txt", "--out", str(workers)])
    for name in ("train.bin", "val.bin", "vocab.json", "corpus.json"):
        assert Path("1", name).read_bytes() == Path("3", name).read_bytes()


def test_plain_texts_and_single_shards_mix_with_archives():
    Path("shards.tar").write_bytes(WHOLE)
    Path("a_data.xz").write_bytes(lzma.compress(tar([("a.txt", "one\r\nshard")])))
    Path("B.TXT").write_text("\ufeffa\r\rtext", encoding="utf-16", newline="")
    train, val, _ = prepare("shards.tar", "a_data.xz", "B.TXT")
    assert train + val == [*CLEANED, "one\nshard", "\ufeffa\n\ntext"]


def test_a_long_text_gives_the_batches_of_the_text_file_itself():
    text = "\ufeff" + "01😀\r\r\n" * 250_000  # a piece ends between \r and \n
    text += "\ufeff" * 2**19  # these stand at the start of a piece, but not of the text
    Path("long.txt").write_text(text, encoding="utf-8", newline="")
    prepare_owt.main(["long.txt", "--out", "out"])
    expected, tokenizer = gpt.load_data(tiny(data="long.txt"))
    splits, same_tokenizer = gpt.load_data(tiny(data="out"))
    assert tokenizer.chars == same_tokenizer.chars
    for name in ("train", "val"):
        assert isinstance(splits[name], np.memmap)
        assert np.array_equal(splits[name], expected[name])


def test_a_sample_takes_some_shards_which_seed_and_archive_choose_and_not_its_folder():
    documents = [f"number {number}" for number in range(200)]
    archive = tar(owt(documents, per_shard=1))
    chosen = []
    for folder, seed in [("one", "3"), ("two/deep", "3"), ("one", "5")]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "a.tar").write_bytes(archive)
        train, val, _ = prepare(f"{folder}/a.tar", "--sample", "0.25", "--seed", seed)
        chosen.append(train + val)
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert 30 < len(chosen[0]) < 70
    assert set(chosen[0]) < set(documents)


def test_characters_rarer_than_min_count_become_unk():
    documents = ["on a mat " * 4, "on a mat " * 4, "moon éééé ñññ"]  # an END is as rare as an ñ
    Path("a.tar").write_bytes(tar(owt(documents)))
    train, val, corpus = prepare("a.tar", "--min_count", "4")
    assert train + val == [*documents[:2], f"moon éééé {UNK}{UNK}{UNK}"]
    assert corpus["unknown"] == 3


@pytest.mark.parametrize("share, count", [("0.5", 20), ("0.1", 4)])
def test_val_fraction_is_the_share_for_validation_and_cuts_between_documents(share, count):
    documents = [f"number {number:02d}" for number in range(40)]
    Path("a.tar").write_bytes(tar(owt(documents)))
    train, val, _ = prepare("a.tar", "--val_fraction", share)
    assert val == documents[-count:]
    assert train == documents[:-count]


def test_what_is_not_read_is_counted_by_kind_printed_and_kept(capsys):
    files = [("a.txt", "text"), ("b.txt", "text"), ("._a.txt", "x"), ("c.PDF", "x"), ("d.pdf", "x"),
             ("e.json.gz", "x"), ("LICENSE", "x"), ("f.txt", "\0")]
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as archive:
        for kind in (b"1", b"2", b"3", b"5", b"6"):  # two links, a device, a folder, a pipe
            member = tarfile.TarInfo(f"{kind.decode()}.txt")
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
    Path("folder/deeper").mkdir(parents=True)
    Path("folder/deeper/links.tar").write_bytes(links.getvalue())
    Path("folder/a.tar").write_bytes(tar(files))
    Path("folder/._b.txt").write_text("x")
    Path("folder/README.md").write_text("x")
    train, val, corpus = prepare("folder")
    assert train + val == ["text", "text"]
    assert corpus["not_read"] == {"._ of macOS": 2, ".pdf": 2, ".gz": 1, ".md": 1, "no ending": 1,
                                  "documents with a NUL": 1, "links and other special files": 4}
    assert ("; not read: 2 ._ of macOS, 1 .gz, 1 .md, 2 .pdf, 1 documents with a NUL, "
            "4 links and other special files, 1 no ending\n") in capsys.readouterr().out


def test_links_to_folders_and_pipes_in_a_folder_are_counted_as_not_read():
    for name in ("folder", "elsewhere"):
        Path(name).mkdir()
        Path(name, "a.txt").write_text(name)
    Path("folder/link").symlink_to("../elsewhere")
    Path("folder/broken.txt").symlink_to("nothing")
    Path("folder/link.txt").symlink_to("../book.txt")
    os.mkfifo("folder/pipe.txt")
    train, val, corpus = prepare("folder")
    assert train + val == ["folder", TEXT]
    assert corpus["not_read"] == {"links and other special files": 3}


@pytest.mark.parametrize("ending", ["sha256", "asc", "txt", "zst"])
def test_a_file_beside_an_archive_that_only_shares_its_name_is_no_archive(ending):
    Path("folder").mkdir()
    Path("folder/a.tar").write_bytes(WHOLE)
    Path(f"folder/a.tar.{ending}").write_text("d41d8cd98f a.tar\n")
    train, val, corpus = prepare("folder")
    if ending == "txt":
        assert (train + val).pop() == "d41d8cd98f a.tar\n"
    else:
        assert train + val == CLEANED
        assert corpus["not_read"].pop(f".{ending}") == 1
    assert corpus["not_read"] == NOT_READ


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "/absolute.txt", "../up.txt"])
def test_names_in_an_archive_write_nothing_elsewhere(name):
    inner = lzma.compress(tar([(name, "first"), ("last.txt", "last")], format=tarfile.GNU_FORMAT))
    Path("a.tar").write_bytes(tar([("../../evil_data.xz", inner), ("/x.txt", "more")]))
    before = set(Path("..").rglob("*"))
    train, val, _ = prepare("a.tar")
    assert train + val == ["first", "last", "more"]
    assert set(Path("..").rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf_8_are_read_counted_and_printed(kind, capsys):
    latin = os.fsdecode(b"caf\xe9")
    files = [(f"{latin}.txt", "text"), (f"a.{latin}", "x"), ("a.\x1b[2J", "x")]
    shard = lzma.compress(tar(files, format=kind))
    Path("a.tar").write_bytes(tar([(f"{latin}_data.xz", shard)], format=kind))
    train, val, corpus = prepare("a.tar", "a.tar", "--sample", "0.999999")
    assert train + val == ["text", "text"]
    assert corpus["not_read"] == {f".{latin}": 2, ".\x1b[2j": 2}
    printed = capsys.readouterr().out
    assert f"not read: 2 .{UNK}[2j, 2 .caf{UNK}\n" in printed
    Path("b.tar").write_bytes(tar([(f"{latin}_data.xz", shard[:-1])], format=kind))
    assert_refused(prepare_owt.main, ["b.tar", "--out", "out"],
                   f": b.tar/caf{UNK}_data.xz: no tar, or damaged")


def test_a_tar_may_begin_with_a_name_that_looks_like_a_packed_file():
    for number, name in enumerate(["BZhang.txt", "BZh9.txt", os.fsdecode(b"\x1f\x8b.txt")]):
        content = tar([(name, "first"), ("last.txt", "last")], format=tarfile.GNU_FORMAT)
        Path(f"{number}.tar").write_bytes(content)
        Path(f"{number}_data.xz").write_bytes(lzma.compress(content))
        train, val, _ = prepare(f"{number}.tar", f"{number}_data.xz")
        assert train + val == ["first", "last"] * 2


def test_a_file_with_holes_in_a_tar_is_counted_and_what_follows_it_is_read():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("holes.txt")
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                              "GNU.sparse.name": "holes.txt", "GNU.sparse.realsize": "2000"}
        content = b"1\n1997\n3\n".ljust(512, b"\0") + b"end"  # one piece, 3 bytes from 1997 on
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("last.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"last"))
    Path("a.tar").write_bytes(buffer.getvalue())
    train, val, corpus = prepare("a.tar", "a.tar")
    assert train + val == ["last", "last"]
    assert corpus["not_read"] == {"links and other special files": 2}


@pytest.mark.parametrize("name, content", [("a.tar", WHOLE), ("a.txt", "é\n".encode() * 999),
                                           ("a.xz", owt(DOCUMENTS)[0][1])],
                         ids=["tar", "txt", "xz"])
def test_both_passes_show_how_far_they_are(name, content, monkeypatch):
    Path(name).write_bytes(content)
    bars = []

    def visible(**options):
        options.update(disable=False, file=io.StringIO())
        bars.append(gpt.tqdm(**options))
        return bars[-1]
    monkeypatch.setattr(prepare_owt, "tqdm", visible)
    prepare_owt.main([name, "--out", "out"])
    for bar in bars:
        assert bar.n >= bar.total > 0
    splits, tokenizer = gpt.load_data(tiny(data="out", block_size=1))
    ids = np.concatenate([splits["train"], splits["val"]])
    documents = np.count_nonzero(ids == tokenizer.end)
    assert bars[0].postfix == f"{documents} documents, {len(ids):,} characters"
    assert len(bars) == 2


def test_memory_holds_a_few_batches_however_long_the_text_is(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    read, written, waiting = [], [], []
    write_text = prepare_owt.write_text

    def long_text(path):
        for _ in range(20):
            read.append(path)
            yield "0123456789abcde\n" * 2**16  # a batch of a megabyte

    def watched(path, batch):
        waiting.append(len(read) - len(written))  # batches that are read and not yet written
        result = write_text(path, batch)
        written.append(path)
        return result

    monkeypatch.setattr(gpt, "read_text", long_text)
    monkeypatch.setattr(prepare_owt, "write_text", watched)
    prepare_owt.main(["book.txt", "--out", "out"])
    assert len(written) == 21  # and one for END
    assert max(waiting) <= 5


# Where packed streams may stand: in a file of that name, or in a tar, as a file of this one.
PACKED = {"a.tar.xz": "", "A.TGZ": "", "a.tar.bz2": "", "a_data.xz": "",
          "shards.tar": "b_data.xz", "outer.tar": "b.tar.gz"}
PACK = {"xz": lzma.compress, "gz": gzip.compress, "tgz": gzip.compress, "bz2": bz2.compress,
        "tar": bytes}
SMALL = tar(texts(["one", "two", "three"]))


def pack(name, content):
    """Packs one stream as the name asks for."""
    inner = PACKED.get(name) or name
    ending = inner.lower().rpartition(".")[2]
    return PACK[ending](content)


def put(name, packed):
    """Writes packed streams to where they stand."""
    inner = PACKED.get(name)
    if inner:
        packed = tar([(inner, packed), ("last.txt", "last")])
    Path(name).write_bytes(packed)


def assert_damaged(name, *words):
    """It is refused by its name, or by the name of what is damaged in it; nothing is left."""
    damaged = name
    if PACKED.get(name):
        damaged = f"{name}/{PACKED[name]}"
    assert_refused(prepare_owt.main, [name, "--out", "out"], f": {damaged}", "no tar, or damaged: ",
                   *words)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", PACKED)
def test_streams_are_read_one_behind_the_other_with_zeros_between_and_behind_them(name):
    packed = pack(name, SMALL[:700]) + pack(name, SMALL[700:900])
    packed += bytes(2**20 - len(packed))  # the next one begins where a piece begins
    packed += pack(name, SMALL[900:]) + pack(name, b"") + bytes(2**20 + 4)
    put(name, packed)
    train, val, _ = prepare(name)
    assert (train + val)[:3] == ["one", "two", "three"]


def flip(data, place):
    """Changes a byte."""
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


@pytest.mark.parametrize("name", PACKED)
def test_damage_in_or_behind_any_stream_is_refused_by_name(name):
    a = pack(name, SMALL[:700])
    b = pack(name, SMALL[700:])
    zeros = bytes(4)
    for packed in (a + b + b"junk", a + b + zeros + b"junk", a + b + b"\n",  # behind the last
                   flip(a, 0) + b, a + flip(b, 0), a + zeros + flip(b, 0),  # heads
                   a[:-9] + b, a + b[:-9], a + b[:-1], a + b[:2],  # what is cut
                   flip(a, len(a) // 2) + b, a + flip(b, len(b) // 2)):
        put(name, packed)
        assert_damaged(name)


@pytest.mark.parametrize("name", ["a_data.xz", "shards.tar"])
def test_an_xz_that_is_none_is_refused_by_name(name):
    # .lzma, the older format, has no checksum. Behind an .xz it is junk to xz itself.
    older = lzma.compress(SMALL, lzma.FORMAT_ALONE)
    for content in (b"", b"\xfd7zXZ", bytes(9999), b"text", SMALL, lzma.compress(b"") + older):
        put(name, content)
        assert_damaged(name)


@pytest.mark.parametrize("name", ["a_data.xz", "shards.tar"])
def test_an_xz_that_holds_something_else_than_a_tar_is_refused_by_name(name):
    for content in (flip(SMALL, 0), b"text" * 999, b"", lzma.compress(SMALL), gzip.compress(SMALL)):
        put(name, lzma.compress(content))
        assert_damaged(name)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_a_tar_that_is_packed_in_another_way_than_its_name_says_is_refused_by_name(name):
    for packed in (lzma.compress(SMALL), gzip.compress(SMALL), bz2.compress(SMALL), SMALL):
        Path(name).write_bytes(packed)
        if packed != pack(name, SMALL):
            assert_damaged(name)


@pytest.mark.parametrize("name", ["a.tar", *PACKED])
def test_tars_that_were_joined_are_refused_by_name_and_zeros_behind_the_end_are_not(name):
    put(name, pack(name, SMALL + bytes(2**20)))
    train, val, _ = prepare(name)
    assert (train + val)[:3] == ["one", "two", "three"]
    put(name, pack(name, SMALL + bytes(512) + tar(texts(["four"]))))
    assert_damaged(name, "follows its end")


# Where a tar can be damaged: cut anywhere, or with a byte of its heads changed.
USED = len(WHOLE.rstrip(b"\0"))
BLOCKS = -(-USED // 512) * 512
SHARD = owt(DOCUMENTS)[0][1]
DAMAGED = []
for length in (0, 100, 512, 700, USED // 2, USED - 1, BLOCKS, BLOCKS + 512):
    DAMAGED.append(WHOLE[:length])
for place in (0, 512, 512 + len(SHARD) // 2, 1024 + len(SHARD) // 512 * 512):
    DAMAGED.append(flip(WHOLE, place))


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_tar_is_refused_by_name(content):
    Path("a.tar").write_bytes(content)
    assert_damaged("a.tar")
    Path("a.tar").write_bytes(tar([("in/b.tar", content)]))
    assert_refused(prepare_owt.main, ["a.tar", "--out", "out"], ": a.tar/in/b.tar", "damaged: ")


@pytest.mark.parametrize("content, line", [
    (b"\xe9t\xe9", 1), (b"one\ntwo\ncaf\xc3", 3), (b"one\na\0b", 2), (b"\xff\xfea\0\0\0b\0", 1)])
def test_a_text_file_that_is_not_text_is_refused_by_name_and_line(content, line):
    Path("bad.txt").write_bytes(content)
    assert_refused(prepare_owt.main, ["book.txt", "bad.txt", "--out", "out"],
                   f"bad.txt, line {line}: ")
    assert sorted(os.listdir()) == ["bad.txt", "book.txt"]


def test_an_out_that_exists_is_refused_and_stays(out):
    assert_refused(prepare_owt.main, ["book.txt", "--out", "out"], "out exists: delete it")
    assert_refused(prepare_owt.main, ["book.txt", "--out", "book.txt"], "book.txt exists")
    Path("link").symlink_to("nothing")
    assert_refused(prepare_owt.main, ["book.txt", "--out", "link"], "link exists")
    assert sorted(os.listdir()) == ["book.txt", "link", "out"]
    assert len(os.listdir("out")) == 4


@pytest.mark.parametrize("owner, name", [(prepare_owt, "write_text"), (CharTokenizer, "encode")],
                         ids=["first pass", "second pass"])
def test_ctrl_c_ends_a_preparation_quietly_with_nothing_left(owner, name, monkeypatch, capsys):
    work = getattr(owner, name)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return work(*arguments)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        prepare_owt.main(["book.txt", "--out", "out"])
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")
    assert os.listdir() == ["book.txt"]


def workers_of(process):
    """The ids of its child processes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()]


def is_running(pid):
    """Whether there is such a process, and not only its exit status."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def start_preparation(shards):
    """Starts it with real workers -> (process, ids of its workers); they are at work."""
    text = "".join(map(str, range(1_000_000)))  # packed, four such shards are a batch
    shard = lzma.compress(tar([("a.txt", text)]), preset=0)
    Path("a.tar").write_bytes(tar([(f"{number}_data.xz", shard) for number in range(shards)]))
    process = start("prepare_owt.py", ["a.tar", "--out", "out"])
    wait_until(lambda: list(Path("out").glob("*.text")))
    return process, workers_of(process)


def test_workers_leave_ctrl_c_to_their_parent():
    process, workers = start_preparation(shards=12)
    for worker in workers:
        os.kill(worker, signal.SIGINT)  # a terminal tells them, too
    process.communicate()
    assert workers and process.returncode == 0
    assert Path("out/corpus.json").exists()


def test_workers_end_with_their_parent_even_if_it_is_killed():
    process, workers = start_preparation(shards=60)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_running(worker) for worker in workers))
    assert workers
    assert_refused(gpt.main, flags(data="out"), "out", "vocab.json")  # it is not complete
    assert_refused(prepare_owt.main, ["a.tar", "--out", "out"], "out exists: delete it")


def drop(name):
    Path("out", name).unlink()


def cut(name):
    os.truncate(f"out/{name}", 1000)


def exchange(name):
    Path("out", name).write_text('["\\u0003", "a", "b", "\\ufffd"]')


@pytest.mark.parametrize("damage, name", [
    (cut, "train.bin"), (cut, "val.bin"), (drop, "val.bin"), (drop, "corpus.json"),
    (exchange, "vocab.json"), (exchange, "corpus.json")])
def test_a_prepared_folder_whose_files_do_not_belong_together_is_refused(damage, name, out):
    damage(name)
    assert_refused(gpt.main, flags(data="out"), "out")


@pytest.mark.parametrize("words, named", [
    ("", "sources"), ("nothing.tar", "nothing.tar"), ("random.tar", "random.tar"),
    ("random.tar.xz", "random.tar.xz"),
    ("image.png", "or in this sample of them; not read: 1 .png"), ("none", "no documents"),
    ("many.txt", "--min_count"), ("book.txt --sample=0", "sample"),
    ("book.txt --sample=2", "sample"), ("book.txt --samp=1", "--samp"),
    ("book.txt --val_fraction=1", "val_fraction"),
    ("book.txt --val_fraction=0", "val_fraction"),
    ("short.txt --val_fraction=0.99", "too little text"),
    ("book.txt --min_count=0", "min_count"), ("book.txt --min_count=-1", "min_count"),
    ("book.txt --min_count=999999", "rarer than --min_count 999999"),
    ("short.txt --val_fraction=1e-17", "too little text")])
def test_a_mistake_in_preparation_is_one_line_and_exit_status_2(words, named):
    Path("image.png").write_text("x")
    Path("short.txt").write_text("x")
    Path("many.txt").write_text("".join(map(chr, range(0x10000, 0x22000))), encoding="utf-8")
    for name in ("random.tar", "random.tar.xz"):
        Path(name).write_text("x" * 600)
    Path("none").mkdir()
    assert_refused(prepare_owt.main, ["--out=new/out", *words.split()], named)
    assert not Path("new/out").exists()


def test_a_source_that_is_missing_makes_no_folder():
    assert_refused(prepare_owt.main, ["nothing.tar", "--out", "new/out"], "nothing.tar")
    assert not Path("new").exists()


@pytest.mark.parametrize("error, named", [(MemoryError(), "out of memory"),
                                          (BrokenExecutor("a process ended"), "a process ended")])
def test_a_worker_that_dies_for_want_of_memory_is_one_line(error, named, monkeypatch):
    monkeypatch.setattr(prepare_owt, "first_pass", Mock(side_effect=error))
    assert_refused(prepare_owt.main, ["book.txt", "--out", "out"], named)


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_packed_tar_of_many_pieces_is_read_whole(ending):
    rng = random.Random(0)
    documents = ["".join(rng.choices("0123456789abcdef", k=400_000)) for _ in range(2)]
    mode = "w:" + ending.removeprefix("tar.")
    Path(f"a.{ending}").write_bytes(tar(texts(documents), mode))
    train, val, _ = prepare(f"a.{ending}")
    assert train + val == documents
