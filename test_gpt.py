"""Every claim of the README, as a short test: python -m pytest -q"""
import io, json, lzma, math, os, pickle, pty, random, re, select, signal, subprocess, sys, tarfile, textwrap, time
from pathlib import Path

import numpy as np
import pytest
import torch
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
    text = " ".join(gpt.__doc__.split())[:200]
    tokenizer = CharTokenizer.from_text(text)
    config = tiny(block_size=32, n_embd=64, learning_rate=3e-3, max_iters=300, batch_size=16, warmup_iters=50)
    data = np.tile(tokenizer.encode(text), 2)  # so that its end is seen as often as its middle
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
        index = torch.randint(model.tokens.num_embeddings, (rng.randint(1, 3), rng.randint(1, 30)))
        n, k = rng.randint(0, 40), rng.choice([None, 1, 5, 100])
        text = model.generate(index, n, rng.choice([0, 0.5, 1.0, 5.0]), k)
        assert text.shape == (len(index), index.shape[1] + n) and torch.equal(text[:, : index.shape[1]], index)
        assert text.dtype == torch.int64 and 0 <= text.min() and text.max() < model.tokens.num_embeddings


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


# ----------------------------------------------------------------------------------------------------------- training

def test_estimate_loss_is_the_same_every_time_and_leaves_no_trace(book):
    config = tiny(data=book, dropout=0.5)
    splits, tokenizer = gpt.load_data(config)
    model = model_of(tokenizer.vocab_size, dropout=0.5).train()
    first = gpt.estimate_loss(model, splits, config)
    gpt.get_batch(splits["train"], config)
    assert first == gpt.estimate_loss(model, splits, config) and first.keys() == {"train", "val"}
    assert model.training and all(p.grad is None for p in model.parameters())
    assert first["val"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.2)


def test_learning_rate_warms_up_and_decays():
    config = tiny(learning_rate=1.0, warmup_iters=10, max_iters=110)
    rates = [gpt.learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[10] == 1
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[-1] == pytest.approx(0.1)


def test_optimizers_share_out_every_parameter_once():
    for kind in ("adamw", "muon"):
        model = model_of(n_layer=1)
        groups = [g for o in gpt.make_optimizers(model, tiny(optimizer=kind, weight_decay=0.3)) for g in o.param_groups]
        assert sorted(map(id, sum((g["params"] for g in groups), []))) == sorted(map(id, model.parameters()))
        for group in groups:
            assert all((group["weight_decay"] == 0.3) == (p.ndim == 2) for p in group["params"])
    blocks = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert {id(p) for p in groups[-1]["params"]} == blocks  # Muon's


def test_gradient_accumulation_4x8_is_batch_32(book):
    splits, tokenizer = gpt.load_data(tiny(data=book))
    results = []
    for batch_size, grad_accum in ((8, 4), (32, 1)):
        config = tiny(batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.1)
        model = model_of(tokenizer.vocab_size).train()
        optimizers = gpt.make_optimizers(model, config)
        losses = [gpt.training_step(model, optimizers, splits["train"], config, step).item() for step in range(6)]
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (a, x), (b, y) = results
    assert a == pytest.approx(b, abs=1e-5) and torch.allclose(x, y, atol=1e-4) and a[-1] < a[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(book, optimizer, monkeypatch):
    settings = dict(data=book, optimizer=optimizer, dropout=0.2, grad_accum=2, max_iters=8)
    whole = trained(tiny(**settings, out="whole.pkl"))
    step = gpt.training_step

    def stop_after_4(*args):
        if args[4] == 4:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(gpt, "training_step", stop_after_4)
    with pytest.raises(KeyboardInterrupt):
        gpt.train(tiny(**settings, out="parts.pkl"))
    monkeypatch.undo()
    os.chdir(Path(book).parent)
    assert gpt.load_checkpoint("parts.pkl")["step"] == 3  # the last evaluation
    parts = trained(tiny(**settings, out="parts.pkl"))
    for key in ("model", "optimizer", "losses", "best", "step", "corpus"):
        assert same(whole[key], parts[key]), key
    assert not same(whole["model"], trained(tiny(**settings, out="other.pkl", seed=1))["model"])


def test_bfloat16_loss_is_close_to_float32(book):
    splits, tokenizer = gpt.load_data(tiny(data=book))
    model, (x, y) = model_of(tokenizer.vocab_size, n_embd=64), gpt.get_batch(splits["train"], tiny())
    losses = []
    for dtype in ("float32", "bfloat16"):
        with gpt.autocast(tiny(dtype=dtype)):
            logits, loss = model(x, y)
        losses.append(loss.item())
        assert logits.dtype == getattr(torch, dtype) and loss.dtype == torch.float32
    assert abs(losses[0] - losses[1]) < 0.02


def test_two_processes_train_what_one_trains(book):
    words = flags(data=book, grad_accum=2, dropout=0.3, max_iters=50, eval_interval=50, learning_rate=3e-3)
    assert gpt.main([*words, "--out", "one.pkl"]) == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", HERE / "gpt.py", *words,
                          "--out", "two.pkl"], capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step     50") == 1  # process 0 alone prints
    one, two = (gpt.load_checkpoint(f"{n}.pkl")["model"] for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def test_broken_compilers_mean_a_notice_and_no_compilation(book, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no compiler here\nat all")
    monkeypatch.setattr(torch, "compile", lambda model: broken)
    assert gpt.main(flags(data=book) + ["--compile"]) == 0
    assert capsys.readouterr().err.count("not compiled: RuntimeError: no compiler here") == 1


def test_tune_prints_a_table_and_a_command_that_works(book, capsys):
    words = flags(data=book, batch_size=4, grad_accum=2)
    assert gpt.main([*words, "--no-compile", "--tune"]) == 0
    table, _, command = capsys.readouterr().out.partition("fastest: python gpt.py ")
    assert table.count("float32") == table.count("bfloat16") == 3 and not Path("book.pkl").exists()
    assert gpt.main(command.split()) == 0 and Path("book.pkl").exists()


def test_interrupted_resumed_and_finished_as_a_process(book):
    settings = dict(data=book, max_iters=1000, eval_interval=500, dropout=0.1)
    words = [sys.executable, HERE / "gpt.py", *flags(**settings)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("step") for line in iter(process.stdout.readline, ""))  # it has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command carries on" in output and not errors
    stopped = gpt.load_checkpoint("book.pkl")["step"]
    assert 0 < stopped < 1000
    output = subprocess.run(words, capture_output=True, text=True).stdout
    assert f"at step {stopped}\n" in output and "step  1,000" in output
    for word in ("losses", "▁", "saved   book.pkl", "python chat.py --model book.pkl"):
        assert word in output
    resumed = gpt.load_checkpoint("book.pkl")
    assert same(resumed["model"], trained(tiny(**settings, out="whole.pkl"))["model"])
    output = subprocess.run(words, capture_output=True, text=True)
    assert output.returncode == 0 and "already" in output.stdout  # a third time there is nothing to do


# -------------------------------------------------------------------------------------------------------- checkpoints

def test_load_model_gives_the_best_weights_of_text_and_the_latest_of_pairs(book):
    checkpoint = trained(tiny(data=book))
    checkpoint["best"]["model"] = {k: v + 1 for k, v in checkpoint["best"]["model"].items()}
    for data, weights in ((book, checkpoint["best"]["model"]), ("pairs.jsonl", checkpoint["model"])):
        checkpoint["config"]["data"] = data
        gpt.save_checkpoint("book.pkl", checkpoint)
        model, tokenizer, config = gpt.load_model("book.pkl", "cpu")
        assert same(dict(model.state_dict()), dict(weights)) and not model.training
        assert tokenizer.chars == checkpoint["chars"] and config.n_embd == 16


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("boom"),)


def bad_checkpoints(good):
    """name -> bytes of a file that is no checkpoint."""
    def saved(change):
        checkpoint = torch.load(io.BytesIO(good), weights_only=True)
        change(checkpoint)
        file = io.BytesIO()
        torch.save(checkpoint, file)
        return file.getvalue()
    first = "tokens.weight"
    return {
        "bomb": saved(lambda c: c.update(step=Bomb())), "pickle": pickle.dumps(Bomb()), "empty": b"", "random": random.Random(0).randbytes(5000),
        "cut": good[: len(good) // 2], "end cut": good[:-1], "other": saved(lambda c: c.clear()),
        **{f"no {key}": saved(lambda c: c.pop(key)) for key in ("config", "chars", "corpus", "step", "losses", "model", "optimizer", "best")},
        "wrong shape": saved(lambda c: c["model"].update({first: torch.zeros(3, 3)})),
        "wrong type": saved(lambda c: c["model"].update({first: c["model"][first].half()})),
        "no storage": saved(lambda c: c["model"].update({first: torch.zeros(1).expand(c["model"][first].shape)})),
        "missing tensor": saved(lambda c: c["model"].pop(first)), "best broken": saved(lambda c: c["best"].update(model={})),
        "optimizer shape": saved(lambda c: c["optimizer"][0][0].update(exp_avg=torch.zeros(1, 1))),
        "n_embd": saved(lambda c: c["config"].update(n_embd=2**30)), "n_layer": saved(lambda c: c["config"].update(n_layer=10**9)),
        "field": saved(lambda c: c["config"].update(colour="red")), "string": saved(lambda c: c["config"].update(n_head="2")),
    }


def test_foreign_checkpoints_are_refused_and_run_nothing(book, capsys):
    trained(tiny(data=book))
    for name, content in bad_checkpoints(Path("book.pkl").read_bytes()).items():
        Path("bad.pkl").write_bytes(content)
        for main, words in ((gpt.main, flags(data=book, out="bad.pkl")), (gpt.main, flags(data=book, init_from="bad.pkl", out="new.pkl")),
                            (chat.main, ["--model", "bad.pkl", "--prompt", "a"])):
            assert main(words) == 2, name
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "bad.pkl" in error, (name, error)
        assert Path("bad.pkl").read_bytes() == content and not Path("new.pkl").exists() and not Path("boom").exists()


def test_killed_at_any_instant_the_run_ends_as_if_it_had_not_been(book):
    settings = dict(data=book, max_iters=300, eval_interval=2, eval_iters=1, dropout=0.1)
    whole, rng, kills = trained(tiny(**settings, out="whole.pkl")), random.Random(), 0
    while kills < int(os.environ.get("KILLS", 5)):
        process = subprocess.Popen([sys.executable, HERE / "gpt.py", *flags(**settings, out="killed.pkl")], stdout=subprocess.PIPE)
        process.stdout.readline()  # loaded
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        kills += 1
        if Path("killed.pkl").exists():
            if gpt.load_checkpoint("killed.pkl")["step"] == 300:
                Path("killed.pkl").unlink()  # it had ended: from the start again
    final = trained(tiny(**settings, out="killed.pkl"))
    assert all(same(final[key], whole[key]) for key in ("model", "optimizer", "losses", "best"))


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(book):
    trained(tiny(data=book))
    before, size = Path("book.pkl").read_bytes(), Path("book.pkl").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); import sys, gpt; sys.exit(gpt.main())"
    run = subprocess.run([sys.executable, "-c", limit, *flags(data=book, max_iters=9)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(HERE)})
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "book.pkl" in run.stderr, run.stderr
    assert Path("book.pkl").read_bytes() == before and not list(Path().glob("*.tmp"))
    assert trained(tiny(data=book, max_iters=9))["step"] == 9


def test_two_runs_at_once_and_the_file_always_loads(book):
    words = [sys.executable, HERE / "gpt.py", *flags(data=book, max_iters=60, eval_interval=1, eval_iters=1)]
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    loads = 0
    while any(run.poll() is None for run in runs):
        if Path("book.pkl").exists():
            loads += gpt.load_checkpoint("book.pkl")["step"] >= 0
    assert loads > 5 and [run.communicate()[1] for run in runs] == [b"", b""] and not list(Path().glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------- errors

def bad_input(book):
    """(main, words, what the one line on stderr must name)"""
    for words, culprit in [
            ("--n_embd 0", "n_embd"), ("--n_embd -4", "n_embd"), ("--n_embd 1.5", "n_embd"), ("--n_embd x", "n_embd"), ("--n_embd", "n_embd"),
            ("--n_embd 15", "n_head"), ("--n_head 3", "n_head"), ("--n_head 0", "n_head"), ("--n_layer -1", "n_layer"), ("--n_layer 100000", "n_layer"),
            ("--batch_size 0", "batch_size"), ("--block_size 0", "block_size"), ("--block_size 5000", "block_size"), ("--grad_accum 0", "grad_accum"),
            ("--max_iters -1", "max_iters"), ("--warmup_iters -1", "warmup_iters"), ("--dropout 1", "dropout"), ("--dropout -0.1", "dropout"),
            ("--dropout nan", "dropout"), ("--learning_rate -1", "learning_rate"), ("--learning_rate nan", "learning_rate"),
            ("--learning_rate inf", "learning_rate"), ("--weight_decay -1", "weight_decay"), ("--grad_clip -1", "grad_clip"),
            ("--eval_interval 0", "eval_interval"), ("--eval_iters 0", "eval_iters"), ("--seed -1", "seed"), ("--seed 1e3", "seed"),
            ("--optimizer sgd", "sgd"), ("--dtype float16", "float16"), ("--device tpu", "tpu"), ("--device cuda:99", "cuda:99"),
            ("--compile=yes", "compile"), ("--colour red", "--colour"), ("--n_emb 16", "--n_emb"), ("stray", "stray"),
            ("--out nowhere/model.pkl", "nowhere"), ("--out .", "."), ("--init_from nothing.pkl", "nothing.pkl"),
            ("--init_from book.txt", "book.txt"), ("--data nothing.txt", "nothing.txt"), ("--data empty.txt", "empty.txt"),
            ("--data short.txt", "short.txt"), ("--data empty.jsonl", "empty.jsonl"), ("--data one.jsonl", "one.jsonl"),
            ("--data bad.jsonl", "line 3"), ("--data wrong.jsonl", "line 2"), ("--data list.jsonl", "line 1"), ("--data empty", "vocab.json"),
            ("--data novocab", "vocab.json"), ("--data noval", "val.bin"), ("--data odd", "train.bin"), ("--data hollow", "train.bin"),
            ("--data notjson", "vocab.json"), ("--data unsorted", "vocab.json"), ("--data ids", "ids")]:
        yield gpt.main, [*flags(data=book), *words.split()], culprit
    for words, culprit in [("", "model.pkl"), ("--model nothing.pkl", "nothing.pkl"), ("--model book.txt", "book.txt"), ("--temperature -1", "temperature"),
                           ("--temperature nan", "temperature"), ("--top_k -1", "top_k"), ("--max_new_tokens 0", "max_new_tokens"), ("--seed x", "seed"),
                           ("--model good.pkl --device tpu", "tpu"), ("--colour red", "--colour"), ("--mod x", "--mod")]:
        yield chat.main, ["--prompt", "a", *words.split()], culprit
    for words, culprit in [("", "sources"), ("nothing.tar", "nothing.tar"), ("good.pkl", "good.pkl"), ("empty.txt", "no documents"), ("empty", "no documents"),
                           ("random.tar", "random.tar"), ("random.xz", "random.xz"), ("random.tar.xz", "random.tar.xz"), ("book.txt --sample 0", "sample"),
                           ("book.txt --sample 2", "sample"), ("book.txt --workers 0", "workers"), ("book.txt --val_fraction 1", "val_fraction"),
                           ("book.txt --min_count 0", "min_count"), ("book.txt --out full", "full"), ("book.txt --seed x", "seed")]:
        yield prepare_owt.main, words.split(), culprit


def test_every_mistake_is_answered_in_one_line(book, capsys):
    vocabulary = json.dumps(sorted("ab" + END + UNK))
    pair = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    for name, content in {"empty.txt": "", "short.txt": "abc", "empty.jsonl": "", "one.jsonl": pair, "bad.jsonl": pair * 2 + "{", "list.jsonl": "[1]\n",
                          "wrong.jsonl": pair + '{"prompt": "a"}', "random.tar": "x" * 600, "random.xz": "x", "random.tar.xz": "x", "full/other": "x",
                          "novocab/train.bin": "abcd" * 9, "novocab/val.bin": "abcd" * 9, "noval/vocab.json": vocabulary, "noval/train.bin": "abcd" * 9,
                          **{f"{folder}/{file}": content for folder, changed in {
                              "odd": {"train.bin": "a" * 99}, "hollow": {"train.bin": ""}, "notjson": {"vocab.json": "{"},
                              "unsorted": {"vocab.json": json.dumps(["b", "a", END, UNK])}, "ids": {}}.items()
                             for file, content in {"train.bin": "\0\0\1\0" * 9 + "\xff\xff" * 9, "val.bin": "\0\0" * 20, "vocab.json": vocabulary, **changed}.items()},
                          "empty/notes": ""}.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="latin-1")
    gpt.train(tiny(data=book, out="good.pkl"))
    capsys.readouterr()
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    cases = list(bad_input(book))
    assert len(cases) >= 60
    for main, words, culprit in cases:
        status, error = main(words), capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1 and culprit in error and "Traceback" not in error, (words[-2:], status, error)
        assert all(p.read_bytes() == content for p, content in before.items()), words
        for path in set(p for p in Path().rglob("*.pkl")) - set(before):
            path.unlink()  # a run that began well and then diverged has saved its first step
    for main, words, culprit in [cases[0], cases[33], cases[41], cases[58], cases[75]]:
        run = script(Path(sys.modules[main.__module__].__file__).name, *words)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and culprit in run.stderr, run.stderr


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(book, capsys, monkeypatch):
    gpt.train(tiny(data=book))
    monkeypatch.setattr(gpt, "estimate_loss", lambda *args: {"train": math.nan, "val": math.nan})
    assert gpt.main(flags(data=book, max_iters=9)) == 2 and "--learning_rate" in capsys.readouterr().err
    assert gpt.load_checkpoint("book.pkl")["step"] == 6


def test_out_of_memory_names_the_flags_that_would_fit(book, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")
    monkeypatch.setattr(gpt, "training_step", full)
    assert gpt.main(flags(data=book, batch_size=64)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batch_size 32 --grad_accum 2" in error


def test_a_flag_that_contradicts_the_checkpoint_is_refused(book, capsys):
    gpt.train(tiny(data=book))
    before = Path("book.pkl").read_bytes()
    Path("other.txt").write_text(TEXT + "!")
    for change in (dict(n_embd=32), dict(n_layer=1), dict(n_head=4), dict(block_size=4), dict(optimizer="muon"), dict(seed=5),
                   dict(data="other.txt", out="book.pkl")):
        assert gpt.main(flags(**{"data": book, **change})) == 2
        error = capsys.readouterr().err
        (name, value), *_ = change.items()
        assert error.count("\n") == 1 and ("corpus" if name == "data" else name) in error and str(value) in error
        assert str(TINY.get(name, "")) in error and "--out book-2.pkl" in error and Path("book.pkl").read_bytes() == before
    assert gpt.main(["--data", book, "--device", "cpu", "--max_iters", "7"]) == 0  # what is not said comes from the checkpoint
    assert gpt.load_checkpoint("book.pkl")["step"] == 7 and gpt.load_checkpoint("book.pkl")["config"]["n_embd"] == 16


# --------------------------------------------------------------------------------------------------------------- chat

@pytest.fixture
def model_file(book):
    gpt.train(tiny(data=book, out="model.pkl"))
    return "model.pkl"


def test_chat_answers_once(model_file, capsys):
    words, outputs = ["--prompt", "the c", "--max_new_tokens", "40", "--stats"], []
    for seed in ("1", "1", "2"):
        assert chat.main([*words, "--seed", seed]) == 0
        output = capsys.readouterr()
        assert output.out.startswith("the c") and len(output.out) == 5 + 40 + 1 and "40 characters" in output.err
        outputs.append(output.out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert chat.main(["--prompt", "", "--max_new_tokens", "5"]) == 0 and len(capsys.readouterr().out) == 6


def test_chat_in_a_pipe_prints_the_text_and_nothing_else(model_file):
    run = script("chat.py", "--seed", 1, "--max_new_tokens", 20, input="the \ncat\n/help\n")
    once = script("chat.py", "--seed", 1, "--max_new_tokens", 20, "--prompt", "the ").stdout
    assert run.returncode == 0 and run.stdout.startswith(once) and run.stdout[len(once) :].startswith("cat")
    assert len(run.stdout) == len("the cat") + 2 * 21 and "/quit" in run.stderr


def test_chat_keeps_the_conversation_until_cleared(model_file):
    talk = chat.Chat(*gpt.load_model(model_file), max_new_tokens=3)
    first = "".join(talk.answer("the"))
    "".join(talk.answer("cat"))
    text = talk.tokenizer.decode(talk.context)
    assert text[:9].replace(END, "\n") == "the" + first + "cat" and len(text) == 12


def test_control_characters_never_reach_the_terminal():
    assert gpt.printable("a\x1b[2J\r\x00\x9b\u202e\n\tb é日😀") == f"a{UNK}[2J{UNK * 4}\n\tb é日😀"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_chat_in_a_terminal(model_file):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, str(HERE / "chat.py"), "--max_new_tokens", "1000000000", "--seed", "1"])

    def read_until(text, seconds=60):
        seen, end = "", time.time() + seconds
        while text not in seen and time.time() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 10000).decode("utf-8", "replace")
        assert text in seen, seen[-300:]
        return seen
    read_until("> ")
    os.write(terminal, "the é\n".encode())
    read_until("never seen: 1)")
    time.sleep(0.5)
    os.write(terminal, b"\x03")  # Ctrl-C stops the answer ...
    read_until("\n> ")
    os.write(terminal, b"/clear\n")
    read_until("> ")
    os.write(terminal, b"\x04")  # ... Ctrl-D the program
    end = time.time() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.time() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                os.read(terminal, 1000)
            except OSError:
                pass
    os.close(terminal)
    assert ended == (pid, 0)


# --------------------------------------------------------------------------------------------- fine-tuning, quantizing

def write_pairs(pairs, path="pairs.jsonl"):
    Path(path).write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")


def test_pairs_become_prompt_line_completion_end():
    write_pairs([("a", "b"), ("c\x03", "d\r\ne")] * 5)
    splits, tokenizer = gpt.load_data(tiny(data="pairs.jsonl", block_size=3))
    assert tokenizer.decode(splits["train"]) == f"a\nb{END}c{UNK}\nd\ne{END}" * 4 + f"a\nb{END}"
    assert tokenizer.decode(splits["val"]) == f"c{UNK}\nd\ne{END}"
    splits, _ = gpt.load_data(tiny(data="pairs.jsonl", block_size=50))  # repeated until a block fits
    assert len(splits["val"]) > 50 and tokenizer.decode(splits["val"]).startswith(f"c{UNK}\nd\ne{END}c")


def test_fine_tuning_answers_prompts_and_stops_at_end(book, capsys):
    gpt.train(tiny(data=book, out="base.pkl", n_embd=32, block_size=24))
    pairs = [("the cat", "sat"), ("a dog", "ran"), ("on a mat", "the dog"), ("é", "cat")]  # "é" is not in the base
    write_pairs(pairs * 5)
    words = ["--init_from", "base.pkl", "--data", "pairs.jsonl", "--device", "cpu", "--max_iters", "300", "--learning_rate", "5e-3",
             "--dropout", "0", "--batch_size", "16"]
    base = gpt.load_checkpoint("base.pkl")
    assert gpt.main([*words, "--n_layer", "1"]) == 2 and "n_layer 2, not 1" in capsys.readouterr().err
    assert gpt.main(words) == 0 and "unknown" in capsys.readouterr().out
    tuned = gpt.load_checkpoint("pairs.pkl")
    assert tuned["chars"] == base["chars"] and tuned["config"]["n_embd"] == 32
    model, tokenizer, config = gpt.load_model("pairs.pkl")
    assert config.answers_prompts and same(dict(model.state_dict()), tuned["model"])
    talk = chat.Chat(model, tokenizer, config, temperature=0, max_new_tokens=50)
    for prompt, completion in pairs * 2:  # over several turns
        assert "".join(talk.answer(prompt)) == completion
    text = tokenizer.decode(talk.context)
    assert text.startswith(f"{END}the cat\nsat{END}a dog\nran{END}") and text.endswith(END)
    run = script("chat.py", "--model", "pairs.pkl", "--temperature", 0, input="a dog\nthe cat\n")
    assert run.stdout == "ran\nsat\n"


@pytest.mark.parametrize("fast", [True, False])
def test_int8_is_close_to_float32_and_a_quarter_of_its_size(book, monkeypatch, fast):
    config = tiny(data=book, n_embd=64, n_head=4, max_iters=60, eval_interval=60, learning_rate=3e-3)
    model, (splits, tokenizer) = gpt.train(config), gpt.load_data(config)
    x, y = gpt.get_batch(splits["val"], config)
    (logits, loss), before = model(x, y), chat.size(model)
    if not fast:
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    model = chat.quantize(model)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules()) and chat.size(model) < 0.3 * before
    with torch.no_grad():
        quantized, quantized_loss = model(x, y)
    assert (quantized - logits).abs().max() < 0.1 * logits.abs().max() and abs(quantized_loss - loss) < 0.01
    assert model.generate(x[:1], 20).shape == (1, 28)


def test_the_slow_int8_product_equals_the_fast_one(monkeypatch):
    linear, x = chat.Int8Linear(torch.nn.Linear(64, 32).bfloat16()), torch.randn(2, 3, 64).bfloat16()
    fast = linear(x)
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert fast.shape == (2, 3, 32) and torch.allclose(fast.float(), linear(x).float(), atol=0.02, rtol=0.02)


# ------------------------------------------------------------------------------------------------------------ prepare

DOCUMENTS = ["one\r\ntwo", "日本語 😀 e\u0301", b"bad \xff\xe2\x82 end", "with \x03 inside", "\ufeffmark", "x" * 3000, ""] + [f"document {i}" for i in range(13)]
CLEANED = ["one\ntwo", "日本語 😀 e\u0301", f"bad {UNK}{UNK} end", f"with {UNK} inside", "mark", "x" * 3000] + [f"document {i}" for i in range(13)]


def tar(files, path=None, **options):
    """A tar as bytes; files: [(name, bytes or TarInfo type)]."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            if isinstance(content, bytes) and len(content) == 1 and content in b"12345":
                info.type, info.linkname, content = content, "/etc/passwd", b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if path:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def owt(documents=DOCUMENTS, per_shard=7):
    """OpenWebText's shape: [(name of a shard, xz of a tar of documents)]."""
    groups = [documents[i : i + per_shard] for i in range(0, len(documents), per_shard)]
    return [(f"openwebtext/subset-{k}_data.xz", lzma.compress(tar([(f"{i}.txt", d) for i, d in enumerate(group)])))
            for k, group in enumerate(groups)]


def prepared(*words, out="out"):
    """Prepares, then returns the documents of both splits and corpus.json."""
    assert prepare_owt.main([*map(str, words), "--out", out]) == 0
    splits, tokenizer = gpt.read_folder(Path(out))
    texts = {name: tokenizer.decode(ids) for name, ids in splits.items()}
    assert all(text.endswith(END) for text in texts.values())
    return [text[:-1].split(END) for text in texts.values()], json.loads(Path(out, "corpus.json").read_text())


def test_constants_are_those_of_gpt():
    assert (prepare_owt.END, prepare_owt.UNK) == (END, UNK)


def test_every_kind_of_source_comes_back_character_for_character():
    shards = owt()
    tar(shards, "a.tar")
    Path("b.tar.xz").write_bytes(lzma.compress(Path("a.tar").read_bytes()))
    Path("c").mkdir()
    for name, content in shards:
        Path("c", Path(name).name).write_bytes(content)
    tar([(f"{i}.txt", d) for i, d in enumerate(DOCUMENTS)], "d.tar")
    for source in ("a.tar", "b.tar.xz", "c", "d.tar"):
        (train, val), corpus = prepared(source)
        assert train + val == CLEANED and len(train) == int(0.9 * len(CLEANED)), source
        assert corpus["documents"] == len(CLEANED) and corpus["characters"] == sum(map(len, CLEANED))
    Path("e_data.xz").write_bytes(lzma.compress("plain\r\ntext".encode()) + lzma.compress(b" goes on"))
    Path("f.txt").write_bytes("\ufeffa text\r\n".encode() + b"\xff")
    (train, val), _ = prepared("a.tar", "e_data.xz", "f.txt", "c")
    assert train + val == CLEANED + ["plain\ntext goes on", "a text\n" + UNK] + CLEANED


def test_prepared_texts_of_random_characters_come_back():
    rng = random.Random(7)
    documents = ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x4000), rng.randrange(0xE000, 0x110000)]))
                         for _ in range(rng.randrange(1, 4000))).replace("\r\n", "") for _ in range(30)]
    tar(owt(documents, 3), "a.tar")
    (train, val), _ = prepared("a.tar")
    assert train + val == [d.replace(END, UNK).removeprefix("\ufeff") for d in documents]


def test_a_long_text_streams_and_is_cut_by_position():
    text = "0123456789\r\n" * 400_000  # read in several pieces, some of which end between \r and \n
    Path("long.txt").write_text(text, encoding="utf-8", newline="")
    prepare_owt.main(["long.txt", "--out", "out"])
    splits, tokenizer = gpt.read_folder(Path("out"))
    cleaned = text.replace("\r\n", "\n")
    assert tokenizer.decode(splits["train"]) == cleaned[: int(0.9 * len(cleaned))]
    assert tokenizer.decode(splits["val"]) == cleaned[int(0.9 * len(cleaned)) :] + END


def test_the_result_does_not_depend_on_the_number_of_workers():
    tar(owt(DOCUMENTS * 9, 5), "a.tar")
    results = []
    for workers in (1, 2, 5):
        prepared("a.tar", "--workers", workers)
        results.append({p.name: p.read_bytes() for p in Path("out").iterdir()})
    assert results[0] == results[1] == results[2] and results[0].keys() == {"train.bin", "val.bin", "vocab.json", "corpus.json"}


def test_sample_and_min_count_and_val_fraction():
    documents = [f"number {i} \u2603" for i in range(40)] + ["rare é"]
    tar(owt(documents, 1), "a.tar")
    (train, val), _ = prepared("a.tar", "--sample", 0.25, "--seed", 3)
    assert 10 <= len(train + val) <= 11 and set(train + val) < set(documents)
    assert [train, val] == prepared("a.tar", "--sample", 0.25, "--seed", 3)[0] != prepared("a.tar", "--sample", 0.25, "--seed", 5)[0]
    (train, val), corpus = prepared("a.tar", "--min_count", 2, "--val_fraction", 0.5)
    assert len(train) == 20 and val[-1] == f"r{UNK}re {UNK}" and corpus["unknown"] == 2


def test_too_many_characters_for_16_bits(capsys):
    many = [chr(c) for c in range(0x10000, 0x10000 + 70_000)]
    Path("many.txt").write_text("".join(many), encoding="utf-8")
    assert prepare_owt.main(["many.txt", "--out", "out"]) == 2 and "one shard" in capsys.readouterr().err
    tar(owt(["".join(many[i::2]) for i in range(2)], 1), "a.tar")
    assert prepare_owt.main(["a.tar", "--out", "out"]) == 2 and "--min_count" in capsys.readouterr().err
    assert not Path("out").exists() and not Path("out.tmp").exists()


def test_hostile_archives_write_nothing_elsewhere():
    hostile = [("/abs.txt", "absolute"), ("../up.txt", "parent"), ("link.txt", b"1"), ("soft.txt", b"2"), ("char.txt", b"3"), ("block.txt", b"4"),
               ("folder.txt", b"5"), ("empty.txt", b""), ("x" * 300 + ".txt", "long name"), ("last.txt", "last")]
    for options in (dict(format=tarfile.GNU_FORMAT), dict(format=tarfile.PAX_FORMAT)):
        tar([("../../evil_data.xz", lzma.compress(tar(hostile, **options))), ("/dev/null", b"3"), ("notes.md", "not a text")], "a.tar")
        before = {str(p) for p in Path().rglob("*")} | {str(p) for p in Path("..").glob("*")}
        (train, val), _ = prepared("a.tar")
        after = {str(p) for p in Path().rglob("*")} | {str(p) for p in Path("..").glob("*")}
        assert train + val == ["absolute", "parent", "long name", "last"]
        assert {p for p in after - before if not p.startswith("out")} == set()


def test_truncation_anywhere_is_an_error_and_an_old_folder_stays(capsys):
    whole = tar(owt(), "good.tar")
    prepared("good.tar")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    used = len(whole.rstrip(b"\0"))
    shard, compressed = owt()[0][1], lzma.compress(whole)
    cuts = [("cut.tar", whole[:n]) for n in (0, 100, 512, 700, used // 2, used - 1, (used + 511) // 512 * 512)]
    cuts += [("cut_data.xz", shard[:n]) for n in (10, len(shard) // 2, len(shard) - 1)] + [("cut.tar.xz", compressed[:n]) for n in (20, len(compressed) // 2, len(compressed) - 1)]
    damaged = bytearray(whole)
    damaged[512 + len(shard) // 2] ^= 255
    damaged_header = whole[:512] + tar(owt())[512 : 512 + (len(shard) + 511) // 512 * 512] + b"?" + whole[513 + (len(shard) + 511) // 512 * 512 :]
    for name, content in [*cuts, ("flipped.tar", bytes(damaged)), ("header.tar", damaged_header)]:
        Path(name).write_bytes(content)
        assert prepare_owt.main([name, "--out", "out"]) == 2, (name, len(content))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error
        assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before and not Path("out.tmp").exists()


def test_killed_preparation_leaves_nothing_that_gpt_accepts(capsys):
    tar(owt([t * 2000 for t in CLEANED] * 20, 3), "a.tar")
    process = subprocess.Popen([sys.executable, HERE / "prepare_owt.py", "a.tar", "--out", "out"])
    while not Path("out.tmp/train.bin").exists():
        time.sleep(0.001)
    time.sleep(0.05)
    process.kill()
    process.wait()
    assert not Path("out").exists()
    assert gpt.main(["--data", "out.tmp"]) == 2 and "vocab.json" in capsys.readouterr().err
    prepared("a.tar")
    assert not Path("out.tmp").exists()


def test_a_prepared_folder_trains():
    tar(owt(CLEANED * 5), "a.tar")
    prepared("a.tar")
    assert gpt.main(flags(data="out")) == 0 and gpt.load_checkpoint("out.pkl")["step"] == 6


# -------------------------------------------------------------------------------------------------------------- README

def test_readme_lists_every_flag_and_every_lesson_has_its_home():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for field in gpt.fields(Config):
        assert f"| `--{field.name}` |" in readme, field.name
    homes = re.findall(r"^\| .+ \| ((?:`[^`]+`(?:, )?)+) \|$", readme.partition("## The course")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(homes) >= 25
    for home in homes:
        for name in re.findall(r"`([^`]+)`", home):
            file, _, path = name.rpartition(":")
            target = {"": gpt, "chat.py": chat, "prepare_owt.py": prepare_owt}[file]
            for part in path.split("."):
                target = getattr(target, part)
    for test in re.findall(r"`(test_\w+)`", readme):
        assert test == "test_gpt" or callable(globals()[test]), test
