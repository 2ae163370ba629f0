"""Every claim of the README, as a short test: python -m pytest -q"""
import io, json, lzma, math, os, pickle, pty, random, re, select, signal, subprocess, sys, tarfile, textwrap, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import chat, gpt, prepare_owt
from gpt import END, UNK, CharTokenizer, Config

HERE = Path(__file__).parent
TEXT = "".join(random.Random(0).choices(["the ", "cat ", "sat ", "on ", "a ", "mat.\n", "dog ", "ran "], k=1000))
TINY = dict(batch_size=4, block_size=8, n_embd=16, n_head=2, n_layer=2, dropout=0.0, max_iters=6, warmup_iters=2,
            eval_interval=3, eval_iters=2, device="cpu")


def tiny(**changes):
    return Config(**{**TINY, **changes})


def flags(**changes):
    """The same settings as command-line words."""
    return [w for k, v in {**TINY, **changes}.items() for w in (f"--{k}", str(v))]


def model_of(vocab_size=11, seed=0, **changes):
    torch.manual_seed(seed)
    return gpt.GPT(tiny(**changes), vocab_size).eval()


def trained(config):
    """Trains on config and returns the checkpoint."""
    gpt.train(config)
    return gpt.load_checkpoint(config.out)


def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def script(name, *words, **options):
    """A real process: python NAME WORDS..."""
    return subprocess.run([sys.executable, HERE / name, *map(str, words)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------- tokenizer

def test_vocabulary_is_the_sorted_set_of_characters():
    tokenizer = CharTokenizer.from_text("banana é")
    assert tokenizer.chars == "".join(sorted({*"banana é", END, UNK})) and tokenizer.vocab_size == 7
    assert [tokenizer.chars[i] for i in (tokenizer.end, tokenizer.unk)] == [END, UNK]


def test_encode_and_decode_are_inverse_over_all_of_unicode():
    rng = random.Random(1)
    for _ in range(20):
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                       for _ in range(rng.randrange(300)))
        tokenizer = CharTokenizer.from_text(text)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and len(ids) == len(text) and tokenizer.decode(ids) == text
        assert [tokenizer.chars[i] for i in ids] == list(text)
    long = TEXT * (2**20 // len(TEXT) + 2)  # longer than one piece of the look-up
    tokenizer = CharTokenizer.from_text(long)
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_unknown_characters_become_unk_and_nothing_fails():
    tokenizer = CharTokenizer("ab")
    assert tokenizer.decode(tokenizer.encode("a☃b\ud800\U0010ffff")) == f"a{UNK}b{UNK}{UNK}"
    assert len(tokenizer.encode("")) == 0 and tokenizer.decode([]) == ""


# --------------------------------------------------------------------------------------------------------------- data

def test_text_is_cleaned_and_split_by_position(tmp_path):
    (tmp_path / "odd.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xff\x03" + b"x" * 90)
    splits, tokenizer = gpt.load_data(tiny(data="odd.txt", block_size=4))
    text = "one\ntwo" + UNK + UNK + "x" * 90
    assert tokenizer.decode(splits["train"]) == text[: int(0.9 * len(text))]
    assert tokenizer.decode(splits["val"]) == text[int(0.9 * len(text)) :] + END


def test_default_corpus_needs_no_download():
    splits, tokenizer = gpt.load_data(Config())
    assert len(splits["train"]) > 200_000 and len(splits["val"]) / len(splits["train"]) == pytest.approx(1 / 9, rel=0.01)
    assert "statement" in tokenizer.decode(splits["train"]) and END in tokenizer.decode(splits["val"])


def test_batches_are_shifted_by_one_and_stay_in_their_split():
    rng = np.random.default_rng(0)
    for _ in range(50):
        config = tiny(block_size=int(rng.integers(1, 20)), batch_size=int(rng.integers(1, 9)))
        data = np.arange(config.block_size + 1 + rng.integers(30), dtype=np.uint16)
        x, y = gpt.get_batch(data, config)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (config.batch_size, config.block_size)
        assert torch.equal(y, x + 1) and x.min() >= 0 and y.max() < len(data)
    starts = {gpt.get_batch(np.arange(4), tiny(block_size=2))[0][0, 0].item() for _ in range(50)}
    assert starts == {0, 1}  # the first and the last possible block are both drawn


def test_memmap_folder_gives_the_batches_of_the_text_file(book):
    assert prepare_owt.main([book, "--out", "folder"]) == 0
    (a, tokenizer), (b, same_tokenizer) = (gpt.load_data(tiny(data=data)) for data in (book, "folder"))
    assert tokenizer.chars == same_tokenizer.chars and isinstance(b["train"], np.memmap)
    for split in ("train", "val"):
        assert len(a[split]) == len(b[split])
        starts = np.array([0, 3, len(a[split]) - 9])
        assert same(*[gpt.get_batch(data[split], tiny(), starts) for data in (a, b)])


def test_memory_follows_neither_the_size_of_the_file_nor_the_number_of_batches(tmp_path):
    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    with open("big.bin", "wb") as file:
        file.truncate(2 * 10**9)  # sparse: takes no room on the disk
    config = tiny(batch_size=64, block_size=256)
    data = np.memmap("big.bin", np.uint16, "r")
    gpt.get_batch(data, config)
    before = anonymous()
    for _ in range(200):
        gpt.get_batch(data, config)
    assert anonymous() - before < 20  # MiB


# -------------------------------------------------------------------------------------------------------------- model

def test_head_is_what_its_docstring_says():
    lines = textwrap.dedent("\n".join(re.findall(r"^ {8}.*$", gpt.Head.__doc__, re.MULTILINE)))
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    names = dict(q=q, k=k, v=v, torch=torch, T=10, D=8)
    exec(lines, names)
    assert lines.count("\n") >= 4 and torch.allclose(names["out"], gpt.Head()(q, k, v), atol=1e-6)


def test_the_future_never_changes_the_past():
    model, index = model_of(), torch.randint(11, (2, 8))
    for t in range(1, 8):
        changed = index.clone()
        changed[:, t:] = torch.randint(11, (2, 8 - t))
        a, b = model(index)[0], model(changed)[0]
        assert torch.allclose(a[:, :t], b[:, :t], atol=1e-6)
    assert not torch.allclose(model(index)[0][:, -1], model((index + torch.eye(8).long()[0]) % 11)[0][:, -1])  # the past does


def test_block_adds_then_norms():
    block, x = model_of().blocks[0], torch.randn(2, 8, 16)
    middle = block.norm1(x + block.attention(x))
    assert torch.allclose(block(x), block.norm2(middle + block.feedforward(middle)), atol=1e-6)
    assert [type(m).__name__ for m in block.feedforward] == ["Linear", "ReLU", "Linear", "Dropout"]


def test_initial_weights_and_loss():
    config = Config(device="cpu")
    torch.manual_seed(0)
    model = gpt.GPT(config, 81)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert abs(p.mean()) < 2e-3 and p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" not in name:
            assert not p.any(), name
    x, y = torch.randint(81, (2, 16, config.block_size))
    assert model.eval()(x, y)[1].item() == pytest.approx(math.log(81), abs=0.05)


def test_loss_is_the_cross_entropy_and_reaches_every_parameter():
    model, (x, y) = model_of(), torch.randint(11, (2, 4, 8))
    logits, loss = model(x, y)
    assert logits.shape == (4, 8, 11) and model(x)[1] is None
    assert loss.item() == pytest.approx(-logits.log_softmax(-1).gather(-1, y[..., None]).mean().item(), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dropout_is_off_in_evaluation_only():
    model, index = model_of(dropout=0.5), torch.randint(11, (2, 8))
    assert torch.equal(model(index)[0], model(index)[0])
    model.train()
    assert not torch.equal(model(index)[0], model(index)[0])


def test_no_attention_is_a_model_too():
    model, index = model_of(n_layer=0), torch.randint(11, (2, 8))
    assert torch.allclose(model(index)[0][:, 3], model(index.flip(0))[0].flip(0)[:, 3])
    assert model.generate(index, 20).shape == (2, 28)
    for optimizer in ("adamw", "muon"):
        gpt.train(tiny(n_layer=0, optimizer=optimizer, out=optimizer + ".pkl"))


def test_a_short_text_is_memorised():
    text = "".join(random.Random(3).choices("abcdefgh ", k=200))
    tokenizer = CharTokenizer.from_text(text)
    config = tiny(block_size=32, n_embd=64, learning_rate=3e-3, max_iters=250, batch_size=16)
    data = tokenizer.encode(text)
    torch.manual_seed(0)
    model = gpt.GPT(config, tokenizer.vocab_size)
    optimizers = gpt.make_optimizers(model, config)
    for step in range(config.max_iters):
        gpt.training_step(model, optimizers, data, config, step)
    start = torch.from_numpy(data[None, :32].astype(np.int64))
    assert tokenizer.decode(model.eval().generate(start, 168, top_k=1)[0].tolist()) == text


class OneDevice(TorchDispatchMode):
    """Fails if an operation makes a tensor anywhere but on the meta device, which alone forgives a stray CPU tensor."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, function
        return result


def test_everything_is_computed_on_the_device_of_the_model():
    with torch.device("meta"):
        model, (x, y) = model_of(dropout=0.1).train(), torch.zeros(2, 4, 8, dtype=torch.int64)
    with OneDevice():
        model(x, y)[1].backward()
        model(x[:, :1], cache=gpt.Cache(model.config, 4, model.tokens.weight))
    with pytest.raises(AssertionError), OneDevice():  # the check itself can fail
        model.tokens(x) + torch.zeros(1)
    assert all(p.grad.is_meta for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- generation

@pytest.mark.parametrize("batch_size", [1, 3])
def test_cached_logits_equal_uncached_inside_the_window_and_after_each_slide(batch_size, monkeypatch):
    model, seen = model_of(n_embd=32), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1])
    index = torch.randint(11, (batch_size, 3))
    text = model.generate(index, 30)
    assert len(seen) == 30 and torch.equal(text[:, :3], index)
    start = 0  # where the window begins: it slides to the last half whenever 8 positions are full
    for end, (logits, _) in enumerate(seen, 3):
        if end - start > 8:
            start = end - 4
        assert torch.allclose(logits[:, -1], forward(text[:, start:end])[0][:, -1], atol=1e-5)


def test_generation_for_random_configurations():
    rng = random.Random(5)
    for _ in range(25):
        heads = rng.choice([1, 2, 4])
        model = model_of(rng.randint(2, 30), block_size=rng.randint(1, 12), n_head=heads, n_embd=4 * heads, n_layer=rng.randint(0, 3))
        index = torch.randint(model.vocab_size, (rng.randint(1, 3), rng.randint(1, 30)))
        n, k = rng.randint(0, 40), rng.choice([None, 1, 5, 100])
        text = model.generate(index, n, rng.choice([0, 0.5, 1.0, 5.0]), k)
        assert text.shape == (len(index), index.shape[1] + n) and torch.equal(text[:, : index.shape[1]], index)
        assert text.dtype == torch.int64 and 0 <= text.min() and text.max() < model.vocab_size


def test_greedy_and_top_k():
    model, index = model_of(), torch.randint(11, (3, 20))  # longer than block_size
    greedy = model.generate(index, 10, top_k=1)
    assert torch.equal(greedy, model.generate(index, 10, temperature=0)) and torch.equal(greedy, model.generate(index, 10, 1e-5))
    assert torch.equal(greedy[:, 20], model(index[:, -8:])[0][:, -1].argmax(-1))
    allowed = model(index[:1, -8:])[0][0, -1].topk(3).indices.tolist()
    drawn = {model.generate(index[:1], 1, 5.0, 3)[0, -1].item() for _ in range(100)}
    assert drawn == set(allowed)
    for bad in (dict(temperature=-1), dict(top_k=0), dict(temperature=math.nan)):
        with pytest.raises(ValueError):
            model.generate(index, 1, **bad)
    with pytest.raises(ValueError):
        model.generate(index[:, :0], 1)


def test_stream_yields_what_generate_returns():
    model, index = model_of(), torch.randint(11, (2, 4))
    torch.manual_seed(1)
    text = model.generate(index, 12)
    torch.manual_seed(1)
    parts = list(model.stream(index, 12))
    assert all(p.shape == (2, 1) for p in parts) and torch.equal(torch.cat([index, *parts], 1), text)
