"""Every claim of the README, as a short test: python -m pytest -q"""
import io, json, lzma, math, os, pickle, pty, random, re, resource, select, signal, subprocess, sys, tarfile, time
import tracemalloc
from contextlib import redirect_stderr
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import chat, gpt, prepare_owt
from gpt import END, UNK, CharTokenizer, Config

HERE = Path(__file__).parent
GPT, CHAT, PREPARE = ([sys.executable, str(HERE / name)] for name in ("gpt.py", "chat.py", "prepare_owt.py"))
TEXT = "".join(random.Random(0).choices(["the ", "cat ", "sat ", "on ", "a ", "mat.\n", "dog ", "ran "], k=1000))
TINY = dict(data="book.txt", batch_size=4, block_size=8, n_embd=16, n_head=2, n_layer=2, dropout=0.0, max_iters=6,
            warmup_iters=2, eval_interval=3, eval_iters=2, device="cpu")
start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
run = partial(subprocess.run, capture_output=True, text=True, timeout=120)
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # to the last bit, through dicts and lists


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT, encoding="utf-8")


def tiny(**changes):
    return Config(**{**TINY, **changes})


def flags(**changes):  # the same settings as command-line words
    return [w for k, v in {**TINY, **changes}.items() for w in (f"--{k}", str(v))]


def model_of(vocab_size=11, **changes):
    torch.manual_seed(0)
    return gpt.GPT(tiny(**changes), vocab_size).eval()


def trained(**changes):
    gpt.train(config := tiny(**changes))
    return gpt.load_checkpoint(config.out)


def contents(folder="."):  # {path: bytes, or None for a folder}
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def random_text(rng, longest):  # from all of Unicode, a third of it ASCII
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                   for _ in range(rng.randrange(1, longest)))


def refused(main, words, *named):
    """main(words) fails with one line on stderr, which names all that it must, and leaves every file as it was."""
    before = contents()
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        main(words)
    error, status = stderr.getvalue(), stop.value.code
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, (words, status, error)
    assert all(name in error for name in named) and contents() == before, (words, named, error)


def pair(prompt, completion):
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"


def test_encode_and_decode_are_inverse_over_all_of_unicode():
    rng = random.Random(1)
    for text in ["", TEXT * 300, *(random_text(rng, 300) for _ in range(20))]:
        tokenizer = CharTokenizer.from_text(text)
        assert tokenizer.chars == "".join(sorted({*text, END, UNK})) and tokenizer.vocab_size == len(tokenizer.chars)
        assert tokenizer.chars[tokenizer.end] + tokenizer.chars[tokenizer.unk] == END + UNK
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text == "".join(tokenizer.chars[i] for i in ids)
    tokenizer = CharTokenizer("ab")  # what it does not know becomes UNK
    assert tokenizer.decode(tokenizer.encode("a☃b\ud800\U0010ffff")) == f"a{UNK}b{UNK}{UNK}"


def test_texts_and_pairs_are_cleaned_and_split():
    def split(data, block_size):
        splits, tokenizer = gpt.load_data(tiny(data=data, block_size=block_size))
        return tokenizer.decode(splits["train"]), tokenizer.decode(splits["val"])
    Path("odd.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xff\x03" + b"x" * 91)
    assert split("odd.txt", 4) == (f"one\ntwo{UNK}{UNK}" + "x" * 81, "x" * 10 + END)  # 90 % of 100 characters
    Path("pairs.jsonl").write_text((pair("a", "b") + pair("c\x03", "d\r\ne")) * 5)
    assert split("pairs.jsonl", 3) == (f"a\nb{END}c{UNK}\nd\ne{END}" * 4 + f"a\nb{END}", f"c{UNK}\nd\ne{END}")
    assert split("pairs.jsonl", 50)[1] == f"c{UNK}\nd\ne{END}" * 8  # repeated until a block fits


def test_default_corpus_needs_no_download():
    splits, tokenizer = gpt.load_data(Config())
    text = tokenizer.decode(splits["train"])
    assert len(text) > 200_000 and "statement" in text and END in text


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


def test_memory_follows_neither_the_size_of_the_file_nor_the_number_of_batches():
    config, anonymous = tiny(batch_size=64, block_size=256), []
    tracemalloc.start()  # sees what numpy takes and gives back
    for data in (np.zeros(1000, np.uint16), np.memmap("big.bin", np.uint16, "w+", shape=10**9)):  # a sparse file
        for _ in range(200):
            gpt.get_batch(data, config)
        anonymous.append(int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
    assert anonymous[1] - anonymous[0] < 20 * 1024 and tracemalloc.get_traced_memory()[1] < 20 * 2**20  # KiB, bytes
    tracemalloc.stop()


def test_head_is_what_its_docstring_says():
    lines = re.findall(r"^ {8}(.*)$", gpt.Head.__doc__, re.MULTILINE)
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    names = dict(q=q, k=k, v=v, torch=torch, T=10, D=8)
    exec("\n".join(lines), names)
    assert len(lines) >= 5 and torch.allclose(names["out"], gpt.Head()(q, k, v), atol=1e-6)
    block, x = model_of().blocks[0], torch.randn(2, 8, 16)  # and so is the block around it: it adds, then norms
    middle = block.norm1(x + block.attention(x))
    assert torch.allclose(block(x), block.norm2(middle + block.feedforward(middle)), atol=1e-6)
    assert [type(m).__name__ for m in block.feedforward] == ["Linear", "ReLU", "Linear", "Dropout"]


def test_the_future_never_changes_the_past():
    model, index = model_of(), torch.randint(11, (2, 8))
    for t in range(1, 8):
        changed = torch.cat([index[:, :t], torch.randint(11, (2, 8 - t))], dim=1)
        assert torch.allclose(model(index)[0][:, :t], model(changed)[0][:, :t], atol=1e-6)
    changed = torch.cat([(index[:, :1] + 1) % 11, index[:, 1:]], dim=1)
    for n_layer in (0, 2):  # the past does change the future, but without attention it does not
        a, b = (model_of(n_layer=n_layer)(text)[0][:, -1] for text in (index, changed))
        assert torch.allclose(a, b) == (n_layer == 0)


def test_initial_weights_and_loss():
    model = model_of(81, n_embd=128, n_layer=4, block_size=128)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert abs(p.mean()) < 2e-3 and p.std().item() == pytest.approx(0.02, rel=0.05), name
        assert p.ndim == 2 or "norm" in name or not p.any(), name
    x, y = torch.randint(81, (2, 8, 128))
    cross_entropy = -model(x)[0].log_softmax(-1).gather(-1, y[..., None]).mean().item()
    assert cross_entropy == pytest.approx(math.log(81), abs=0.05) and model(x)[1] is None
    for dtype, error in (("bfloat16", 0.02), ("float32", 1e-5)):
        with gpt.autocast(tiny(dtype=dtype)):
            logits, loss = model(x, y)
        assert logits.shape == (8, 128, 81) and logits.dtype == getattr(torch, dtype)
        assert loss.item() == pytest.approx(cross_entropy, abs=error) and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


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


def test_cached_logits_equal_uncached_inside_the_window_and_after_each_slide():
    rng = random.Random(5)
    for _ in range(25):
        T, heads, vocab_size, seen = rng.randint(1, 12), rng.choice([1, 2, 4]), rng.randint(2, 30), []
        model = model_of(vocab_size, block_size=T, n_head=heads, n_embd=8 * heads, n_layer=rng.randint(0, 3))
        index = torch.randint(vocab_size, (rng.randint(1, 3), rng.randint(1, 30)))
        options = rng.randint(0, 40), rng.choice([0, 0.5, 1.0, 5.0]), rng.choice([None, 1, 5, 100])
        torch.manual_seed(1)
        parts = list(model.stream(index, *options))
        hook = model.register_forward_hook(lambda model, words, output: seen.append(output[0][:, -1]))
        torch.manual_seed(1)
        text = model.generate(index, *options)
        hook.remove()
        assert torch.equal(text, torch.cat([index, *parts], dim=1)) and len(parts) == len(seen) == options[0]
        assert text.dtype == torch.int64 and 0 <= text.min() and text.max() < vocab_size
        start = max(0, index.shape[1] - T)  # where the window begins: when it is full it slides to its last half
        for end, logits in enumerate(seen, index.shape[1]):
            start = start if end - start <= T else end - max(1, T // 2)
            assert torch.allclose(logits, model(text[:, start:end])[0][:, -1], atol=1e-5)


def test_greedy_and_top_k():
    model, index = model_of(), torch.randint(11, (3, 20))  # longer than block_size
    greedy = model.generate(index, 10, top_k=1)
    assert all(torch.equal(greedy, model.generate(index, 10, temperature)) for temperature in (0, 1e-5))
    logits = model(index[:, -8:])[0][:, -1]
    assert torch.equal(greedy[:, 20], logits.argmax(-1))
    drawn = {model.generate(index[:1], 1, 5.0, 3)[0, -1].item() for _ in range(100)}
    assert drawn == set(logits[0].topk(3).indices.tolist())
    for bad in (dict(temperature=-1), dict(top_k=0), dict(temperature=math.nan), dict(index=index[:, :0])):
        with pytest.raises(ValueError):
            model.generate(**{"index": index, "max_new_tokens": 1, **bad})


def test_estimate_loss_is_the_same_every_time_and_leaves_no_trace():
    splits, tokenizer = gpt.load_data(tiny())
    model = model_of(tokenizer.vocab_size, dropout=0.5).train()
    first = gpt.estimate_loss(model, splits, tiny())
    x, y = gpt.get_batch(splits["train"], tiny())
    assert first == gpt.estimate_loss(model, splits, tiny()) and first.keys() == {"train", "val"}
    assert model.training and all(p.grad is None for p in model.parameters())
    assert first["val"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.2)
    assert not torch.equal(model(x)[0], model(x)[0])  # dropout is for training ...
    assert torch.equal(model.eval()(x)[0], model(x)[0])  # ... alone


def test_learning_rate_warms_up_and_decays():
    config = tiny(learning_rate=1.0, warmup_iters=10, max_iters=110)
    rates = [gpt.learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[10] == 1
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_share_out_every_parameter_once(kind):
    model = model_of(n_layer=1)
    groups = [g for o in gpt.make_optimizers(model, tiny(optimizer=kind, weight_decay=0.3)) for g in o.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
    assert all((g["weight_decay"] == 0.3) == (p.ndim == 2) for g in groups for p in g["params"])
    blocks = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert ({id(p) for p in groups[-1]["params"]} == blocks) == (kind == "muon")
    gpt.train(tiny(optimizer=kind, n_layer=0))  # no attention is a model too


def test_gradient_accumulation_4x8_is_batch_32():
    splits, tokenizer = gpt.load_data(tiny())
    results = []
    for batch_size, grad_accum in ((8, 4), (32, 1)):
        config = tiny(batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.1)
        model, optimizers, _ = gpt.build(config, tokenizer.vocab_size, splits["train"])
        losses = [gpt.training_step(model, optimizers, splits["train"], config, step).item() for step in range(6)]
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (a, x), (b, y) = results
    assert a == pytest.approx(b, abs=1e-5) and torch.allclose(x, y, atol=1e-4) and a[-1] < a[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(optimizer, monkeypatch):
    settings = dict(optimizer=optimizer, dropout=0.2, grad_accum=2, max_iters=8)
    whole, step, spy = trained(**settings, out="whole.pkl"), gpt.training_step, Mock(wraps=torch.manual_seed)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gpt, "training_step", lambda *args: step(*args) if args[4] < 4 else 1 / 0)
        patch.setattr(torch, "manual_seed", spy)
        trained(**settings)
    assert gpt.load_checkpoint("book.pkl")["step"] == 3  # the last evaluation
    assert len({call.args for call in spy.call_args_list}) == 1 + 4 * 2  # each micro-batch of each step has its seed
    parts = trained(**settings)
    for key in ("model", "optimizer", "losses", "best", "step"):
        assert_same(whole[key], parts[key])
    other = trained(**settings, out="other.pkl", seed=1)["model"]["head.weight"]
    assert whole["corpus"] == parts["corpus"] and not torch.equal(whole["model"]["head.weight"], other)


def test_two_processes_train_what_one_trains(monkeypatch):
    settings = dict(grad_accum=2, dropout=0.3, max_iters=50, eval_interval=50, learning_rate=3e-3)
    gpt.train(tiny(**settings, out="one.pkl"))
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", GPT[1], *flags(**settings, out="two.pkl")]
    process = run([sys.executable, *words])
    assert process.returncode == 0 and process.stdout.count("step     50") == 1, process.stderr  # one of them prints
    for steps in (50, 60):  # the last ten by one process
        one, two = (trained(**{**settings, "max_iters": steps}, out=out)["model"] for out in ("one.pkl", "two.pkl"))
        assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    monkeypatch.setattr(gpt, "WORLD", 2)
    refused(gpt.main, flags(grad_accum=3), "grad_accum 3", "2 processes")


def test_tune_prints_a_table_and_a_command_that_works(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # which would take a minute
    gpt.main([*flags(grad_accum=2), "--tune"])
    table, _, command = capsys.readouterr().out.partition("fastest: python gpt.py ")
    rows = [line.split() for line in table.splitlines() if "float" in line]
    assert len(rows) == 6 and all(int(row[0]) * int(row[1]) == 8 for row in rows) and not Path("book.pkl").exists()
    assert "--batch_size" in command and "--grad_accum" in command  # which an older checkpoint may have otherwise
    gpt.main(command.split())
    assert_same(trained(compile=True, out="a.pkl")["model"], trained(out="b.pkl")["model"])  # no trace of a trial step


def test_interrupted_resumed_and_finished_as_a_process():
    with gpt.stop_requests() as asked, pytest.raises(KeyboardInterrupt):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert len(asked) == 2 and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    settings = dict(max_iters=1000, eval_interval=500, dropout=0.1)
    process = start(words := [*GPT, *flags(**settings)])
    assert any(line.startswith("step") for line in process.stdout)  # it has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command carries on" in output and not errors
    stopped = gpt.load_checkpoint("book.pkl")["step"]
    resumed, again = run(words).stdout, run(words)
    shown = f"at step {stopped} of", "step  1,000", "losses", "▁", "saved   book.pkl", "chat.py --model book"
    assert all(text in resumed for text in shown)
    assert_same(gpt.load_checkpoint("book.pkl")["model"], trained(**settings, out="whole.pkl")["model"])
    assert 0 < stopped < 1000 and again.returncode == 0 and "already" in again.stdout  # the third time


def test_load_model_gives_the_best_weights_of_text_and_the_latest_of_pairs(monkeypatch):
    Path("pairs.jsonl").write_text(pair("the cat", "sat") * 20)
    monkeypatch.setattr(gpt, "estimate_loss", Mock(side_effect=[dict(train=1, val=val) for val in (3, 1, 2) * 2]))
    for data, same in (("book.txt", False), ("pairs.jsonl", True)):
        checkpoint = trained(data=data)
        weights = checkpoint["best"]
        assert torch.equal(weights["head.weight"], checkpoint["model"]["head.weight"]) == same
        model, tokenizer, config = gpt.load_model(Config(data=data).out, "cpu")
        assert_same(dict(model.state_dict()), dict(weights))
        assert not model.training and tokenizer.chars == checkpoint["chars"] and config.n_embd == 16
        assert_same(gpt.open_run(tiny(init_from=config.out, out="new.pkl"))[0]["model"], weights)


class Bomb:
    __reduce__ = lambda self: (Path.touch, (Path("boom"),))


def test_foreign_checkpoints_are_refused_and_run_nothing():
    good, data = trained(), Path("book.pkl").read_bytes()
    bad = [b"", data[: len(data) // 2], data[:-1], random.Random(0).randbytes(5000), pickle.dumps(Bomb()), {}]
    weight = good["model"]["tokens.weight"]
    for *path, key, value in [  # what is changed, added or (None) removed
            *((entry, None) for entry in good), ("model", "tokens.weight", None), ("best", "x", weight),
            ("model", "tokens.weight", weight[1:]), ("best", "tokens.weight", weight[1:]),
            ("step", "x"), ("losses", [1]), ("corpus", None), ("config", "n_head", "x"), ("config", "x", 1),
            ("optimizer", 0, 0, "exp_avg", torch.tensor(0.0)), ("optimizer", 0, 0, "exp_avg", None),
            ("step", Bomb()), ("best", {}), ("optimizer", 0, 0, "exp_avg", torch.zeros(1, 1)),
            ("config", "n_embd", 2**30), ("config", "n_layer", 10**9)]:
        bad.append(gpt.load_checkpoint("book.pkl"))
        place = reduce(getitem, path, bad[-1])
        place.pop(key) if value is None else place.update({key: value})
    large = model_of(len(good["chars"]), n_embd=256)
    hollow = {name: torch.zeros(1).expand(p.shape) for name, p in large.named_parameters()}  # larger than the file
    config = {**good["config"], "n_embd": 256}
    bad.append({**good, "config": config, "optimizer": [{}], "model": hollow, "best": hollow})
    for content in bad:
        Path("bad.pkl").write_bytes(content) if isinstance(content, bytes) else gpt.save_checkpoint("bad.pkl", content)
        refused(gpt.main, flags(out="bad.pkl"), "bad.pkl")
        refused(gpt.main, flags(init_from="bad.pkl", out="new.pkl"), "bad.pkl")
        refused(chat.main, ["--model", "bad.pkl", "--prompt", "a"], "bad.pkl")


def test_killed_at_any_instant_the_run_ends_as_if_it_had_not_been():
    settings = dict(max_iters=300, eval_interval=2, eval_iters=1, dropout=0.1)
    whole, seen = trained(**settings, out="whole.pkl"), False
    for _ in range(int(os.environ.get("KILLS", 5))):
        process = start([*GPT, *flags(**settings)])
        process.stdout.readline()  # loaded
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.communicate()
        seen = seen or Path("book.pkl").exists()  # and from then on it is there
        if seen and gpt.load_checkpoint("book.pkl")["step"] == 300:
            seen = Path("book.pkl").unlink()  # it had ended: from the start again
    final = trained(**settings)
    for key in ("model", "optimizer", "losses", "best"):
        assert_same(final[key], whole[key])


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else():
    gpt.train(tiny())
    before, half = contents(), Path("book.pkl").stat().st_size // 2
    process = start([*GPT, *flags(max_iters=9)])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    error = process.communicate()[1]
    assert process.returncode == 2 and error.count("\n") == 1 and "book.pkl" in error, error
    assert contents() == before and trained(max_iters=9)["step"] == 9


def test_two_runs_at_once_and_the_file_always_loads():
    runs, loads = [start([*GPT, *flags(max_iters=60, eval_interval=1, eval_iters=1)]) for _ in range(2)], 0
    while any(process.poll() is None for process in runs):
        if loads or Path("book.pkl").exists():  # and from then on it is there
            loads += gpt.load_checkpoint("book.pkl")["step"] >= 0
    assert loads > 5 and not any(process.communicate()[1] for process in runs) and not list(Path().glob("*.tmp"))


# A word, values it cannot have, and after a colon what the one line on stderr must name: "value", or else the word.
MISTAKES = {gpt.main: """
    --n_embd 0 -4 1.5 x | --n_embd | --n_embd 15: n_head | --n_head 3 0 | --n_layer -1 100000 | --batch_size 0 | stray
    --block_size 0 5000 | --grad_accum 0 | --max_iters -1 | --warmup_iters -1 | --dropout 1 -0.1 nan | --eval_interval 0
    --eval_iters 0 | --learning_rate -1 nan inf | --weight_decay -1 | --grad_clip -1 | --seed -1 1e3
    --optimizer sgd: value | --dtype float16: value | --device tpu cuda:99: value | --compile=yes: compile
    --colour red: --colour | --n_emb 16: --n_emb | --out .: value | --out nowhere/model.pkl: nowhere
    --init_from nothing.pkl book.txt: value | --data novocab notjson ba words noval odd hollow ids: value
    --data nothing.txt empty.txt short.txt empty.jsonl one.jsonl: value
    --data bad.jsonl: line 3 | --data wrong.jsonl: line 2 | --data list.jsonl: line 1""", chat.main: """
    --model nothing.pkl book.txt: value | --temperature -1 nan | --top_k -1 | --max_new_tokens 0 | --seed x
    --device tpu: value | --colour red: --colour | --mod x: --mod""", prepare_owt.main: """
    : sources | nothing.tar | good.pkl | random.tar | random.xz | random.tar.xz | empty.txt: no documents
    --seed=x: seed | novocab: no documents | book.txt --sample=0 --sample=2: sample | book.txt --workers=0: workers
    book.txt --val_fraction=1: val_fraction | book.txt --min_count=0: min_count | book.txt --out=full: full"""}


def test_every_mistake_is_answered_in_one_line():
    files = {"empty.txt": "", "short.txt": "abc", "empty.jsonl": "", "one.jsonl": pair("a", "b"),
             "bad.jsonl": pair("a", "b") * 2 + "{", "wrong.jsonl": pair("a", "b") + '{"prompt": "a"}',
             "list.jsonl": "[1]\n", "random.tar": "x" * 600, "random.xz": "x", "random.tar.xz": "x", "full/x": "x"}
    good = {"vocab.json": json.dumps([END, "a", "b", UNK]), "train.bin": "\0\0\1\0" * 20, "val.bin": "\0\0" * 20}
    for folder, name, content in [  # in each folder one file is changed or (None) missing
            ("novocab", "vocab.json", None), ("noval", "val.bin", None), ("odd", "train.bin", "a" * 99),
            ("hollow", "train.bin", ""), ("notjson", "vocab.json", "{"), ("ids", "train.bin", "\0\0\xff\xff" * 20),
            ("ba", "vocab.json", json.dumps([*"ba", END, UNK])), ("words", "vocab.json", json.dumps([END, "ab", UNK]))]:
        files |= {f"{folder}/{n}": text for n, text in {**good, name: content}.items() if text is not None}
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="latin-1")
    gpt.train(tiny(out="good.pkl"))
    usual = {gpt.main: flags(), chat.main: ["--prompt", "a", "--model", "good.pkl"], prepare_owt.main: ["--out", "out"]}
    cases = [(chat.main, ["--prompt", "a"], "model.pkl")]
    for main, text in MISTAKES.items():
        for entry in re.split(r" \| |\n *", text.strip()):
            words, _, named = entry.partition(": ")
            word, *values = words.split() or [""]
            for value in values or [""]:
                named_here = value if named == "value" else named or word.lstrip("-")
                cases.append((main, [*usual[main], *filter(None, (word, value))], named_here))
    assert len(cases) == 82
    for main, words, named in cases:
        refused(main, words, named)
    for main, words, named in cases[::20]:  # the same as processes
        process = run([sys.executable, HERE / f"{main.__module__}.py", *words])
        assert process.returncode == 2 and process.stderr.count("\n") == 1 and named in process.stderr, process.stderr


def test_what_breaks_in_training_is_answered_in_one_line(monkeypatch, capsys):
    prepare_owt.main(["book.txt", "--out", "late"])
    Path("late/train.bin").write_bytes(bytes(2**24) + b"\xff" * 40)  # the first 2**23 ids are good
    refused(gpt.main, flags(data="late"), "late: holds ids")
    monkeypatch.setattr(torch, "compile", lambda model: Mock(side_effect=RuntimeError("no compiler here\nat all")))
    gpt.main([*flags(), "--compile"])  # trains without
    assert capsys.readouterr().err.count("not compiled: RuntimeError: no compiler here") == 1
    monkeypatch.setattr(gpt, "training_step", lambda model, *args: model.head.bias.data.fill_(math.nan).sum())
    refused(gpt.main, flags(max_iters=9), "step 9", "--learning_rate")
    monkeypatch.setattr(gpt, "training_step", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory\nand more")))
    for compiled in ([], ["--compile"]):
        refused(gpt.main, [*flags(max_iters=9, batch_size=64), *compiled], "--batch_size 32 --grad_accum 2")
    monkeypatch.setattr(os, "access", lambda *args: False)
    refused(gpt.main, flags(max_iters=9), "book.pkl: no folder")


def test_a_flag_that_contradicts_the_checkpoint_is_refused():
    gpt.train(tiny())
    Path("other.txt").write_text(TEXT + "!")
    for name, old, new in (("n_embd", 16, 32), ("n_layer", 2, 1), ("n_head", 2, 4), ("block_size", 8, 4),
                           ("optimizer", "adamw", "muon"), ("seed", 1337, 5)):
        refused(gpt.main, flags(**{name: new}), f"{name} {old}, not {new}", "--out book-2.pkl")
    prepare_owt.main(["other.txt", "--out", "other"])
    for data in ("other.txt", "other"):
        refused(gpt.main, flags(data=data, out="book.pkl"), "corpus", data, "--out book-2.pkl")
    gpt.main("--data book.txt --device cpu --max_iters 7".split())  # the rest comes from the checkpoint
    assert gpt.load_checkpoint("book.pkl")["step"] == 7


def test_chat_answers_once_keeps_the_conversation_and_works_in_a_pipe(capsys, monkeypatch):
    gpt.train(tiny(out="model.pkl"))
    capsys.readouterr()
    outputs = []
    for seed in ("1", "1", "2"):
        chat.main(["--prompt", "the ", "--max_new_tokens", "20", "--stats", "--seed", seed])
        output, stats = capsys.readouterr()
        assert output.startswith("the ") and len(output) == 4 + 20 + 1 and "20 characters" in stats
        outputs.append(output)
    assert outputs[0] == outputs[1] != outputs[2]
    chat.main(["--prompt", "", "--max_new_tokens", "5"])
    assert len(capsys.readouterr().out) == 6
    piped = run([*CHAT, "--max_new_tokens", "20", "--seed", "1"], input="the \ncat\n/help\n")
    assert piped.returncode == 0 and piped.stdout.startswith(outputs[0] + "cat") and "/quit" in piped.stderr
    assert len(piped.stdout) == len("the cat") + 2 * 21  # the text and nothing else
    talk = chat.Chat(*gpt.load_model("model.pkl"), max_new_tokens=3)
    first, second = ("".join(talk.answer(prompt)) for prompt in ("the", "cat"))
    assert talk.tokenizer.decode(talk.context).replace(END, "\n") == "the" + first + "cat" + second
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\n/clear\n"))
    assert chat.talk(talk, stats=False) is None and not talk.context


def test_control_characters_never_reach_the_terminal(capsys):
    text = "a\x1b[2J\r\x00\x9b\u202e\n\tb é日😀 \u200c"
    tokenizer = CharTokenizer(text)
    model = Mock(**{"stream.return_value": torch.from_numpy(tokenizer.encode(text).astype(np.int64))})  # says it
    chat.Chat(model, tokenizer, tiny()).show("")
    assert capsys.readouterr().out == f"a{UNK}[2J{UNK * 4}\n\tb é日😀 \u200c\n"


def test_chat_in_a_terminal():
    gpt.train(tiny(out="model.pkl"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(CHAT[0], [*CHAT, "--max_new_tokens", "1000000000", "--seed", "1"])
    end = time.time() + 60
    for typed, shown in (("", "> "), ("the é\n", r"never seen: 1\).{50}"), ("\x03", "\n> "), ("/clear\n", "> ")):
        os.write(terminal, typed.encode())  # \x03 is Ctrl-C, which stops the answer
        seen = ""
        while not re.search(shown, seen, re.DOTALL):
            assert time.time() < end, seen[-300:]
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 10000).decode("utf-8", "replace")
    os.write(terminal, b"\x04")  # Ctrl-D
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.time() < end:
        time.sleep(0.1)
    os.close(terminal)
    assert ended == (pid, 0)


def test_fine_tuning_answers_prompts_and_stops_at_end(capsys):
    base = trained(out="base.pkl", n_embd=32, block_size=24)
    pairs = [("the cat", "sat"), ("a dog", "ran"), ("on a mat", "the dog"), ("é", "cat")]  # "é" is not in the base
    Path("pairs.jsonl").write_text("".join(pair(*texts) for texts in random.Random(0).choices(pairs, k=200)))
    words = ["--init_from", "base.pkl", "--data", "pairs.jsonl", "--device", "cpu", "--max_iters", "300",
             "--learning_rate", "5e-3", "--dropout", "0", "--batch_size", "16"]
    refused(gpt.main, [*words, "--n_layer", "1"], "n_layer 2, not 1")
    gpt.main(words)
    assert "unknown" in capsys.readouterr().out
    model, tokenizer, config = gpt.load_model("pairs.pkl")
    assert config.answers_prompts and tokenizer.chars == base["chars"]
    assert config.n_embd == 32 and config.eval_interval == 150  # only the architecture is handed down
    talk = chat.Chat(model, tokenizer, config, temperature=0, max_new_tokens=50)
    for prompt, completion in pairs * 2 + pairs[::-1]:  # over several turns
        assert "".join(talk.answer(prompt)) == completion
    assert tokenizer.decode(talk.context).startswith(f"{END}the cat\nsat{END}a dog\nran{END}on a mat\n")
    assert run([*CHAT, "--model", "pairs.pkl", "--temperature", "0"], input="a dog\nthe cat\n").stdout == "ran\nsat\n"


def test_a_short_text_is_memorised_and_int8_is_close_in_a_quarter_of_the_size(monkeypatch):
    text = " ".join(gpt.__doc__.split())[:200]
    Path("short.txt").write_text(text * 3)  # so that its end is seen as often as its middle
    config = tiny(data="short.txt", block_size=32, n_embd=64, learning_rate=3e-3, max_iters=300, batch_size=16,
                  warmup_iters=50, eval_interval=300)
    model, (splits, tokenizer) = gpt.train(config), gpt.load_data(config)
    recited = model.generate(torch.from_numpy(tokenizer.encode(text[:32])[None].astype(np.int64)), 168, top_k=1)
    assert tokenizer.decode(recited[0].tolist()) == text
    x, y = gpt.get_batch(splits["val"], config, np.arange(4))
    logits, loss = model(x, y)
    before = sum(t.nbytes for t in model.state_dict().values())
    model = chat.quantize(model)
    assert sum(t.nbytes for t in model.state_dict().values()) < 0.3 * before
    odd = chat.quantize(model_of(n_embd=36))  # the fast product would read past the end of such rows
    assert odd.generate(x[:1, :3] % 11, 5).shape == (1, 8) and torch.nn.Linear not in map(type, model.modules())
    linear, z, products = chat.Int8Linear(torch.nn.Linear(64, 32).bfloat16()), torch.randn(2, 3, 64).bfloat16(), []
    for _ in ("fast", "slow"):
        with torch.no_grad():
            quantized, quantized_loss = model(x, y)
        assert (quantized - logits).abs().max() < 0.1 * logits.abs().max() and abs(quantized_loss - loss) < 0.01
        assert model.generate(x[:1], 20).shape == (1, 52)
        products.append(linear(z).float())
        monkeypatch.delattr(torch, "_weight_int8pack_mm", raising=False)
    assert products[0].shape == (2, 3, 32) and torch.allclose(*products, atol=0.02, rtol=0.02)


RANDOM = [re.sub(f"\r\n|{END}|\ufeff", "", random_text(random.Random(i), 3000)) for i in range(13)]
DOCUMENTS = ["one\r\ntwo", "日本語 😀 e\u0301", b"bad \xff\xe2\x82 end", f"an {END}", "\ufeffmark", "", *RANDOM]
CLEANED = ["one\ntwo", "日本語 😀 e\u0301", f"bad {UNK}{UNK} end", f"an {UNK}", "mark", *RANDOM]


def tar(files, **options):
    """A tar of files: (name, text or bytes), or (name, TarInfo type) of what is no file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files:
            info, content = tarfile.TarInfo(name), content.encode() if isinstance(content, str) else content
            if content in (b"1", b"2", b"3", b"4", b"5"):
                info.type, info.linkname, content = content, "/etc/passwd", b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def owt(documents=DOCUMENTS, per_shard=7):
    """OpenWebText's shape: [(name of a shard, xz of a tar of documents)]."""
    groups = [documents[i : i + per_shard] for i in range(0, len(documents), per_shard)]
    return [(f"openwebtext/subset-{k}_data.xz", lzma.compress(tar((f"{i}.txt", d) for i, d in enumerate(group))))
            for k, group in enumerate(groups)]


def prepared(*words):
    """Prepares, then returns the documents of both splits and corpus.json."""
    prepare_owt.main([*words, "--out", "out"])
    splits, tokenizer = gpt.read_folder(Path("out"))
    documents = [tokenizer.decode(ids)[:-1].split(END) for ids in splits.values()]  # the last character is an END too
    return *documents, json.loads(Path("out/corpus.json").read_text())


def test_every_kind_of_source_comes_back_character_for_character():
    assert (prepare_owt.END, prepare_owt.UNK) == (END, UNK)
    Path("a.tar").write_bytes(tar(owt(per_shard=1)))
    Path("b.tar.xz").write_bytes(lzma.compress(tar(owt())))
    Path("c").mkdir()
    for name, content in owt():
        Path("c", Path(name).name).write_bytes(content)
    Path("d.tar").write_bytes(tar((f"{i}.txt", d) for i, d in enumerate(DOCUMENTS)))
    for source, workers in ((source, workers) for source in ("a.tar", "b.tar.xz", "c", "d.tar") for workers in "125"):
        train, val, corpus = prepared(source, "--workers", workers)
        assert train + val == CLEANED and len(train) == int(0.9 * len(CLEANED)), source
        assert corpus["documents"] == len(CLEANED) and corpus["characters"] == sum(map(len, CLEANED))
        assert contents("out").keys() == {"train.bin", "val.bin", "vocab.json", "corpus.json"}
    Path("e_data.xz").write_bytes(lzma.compress(b"plain\r\ntext") + lzma.compress(b" goes on"))
    Path("f.txt").write_bytes("\ufeffa text\r\n".encode() + b"\xff")
    train, val, _ = prepared("a.tar", "e_data.xz", "f.txt", "c")
    assert train + val == CLEANED + ["plain\ntext goes on", "a text\n" + UNK] + CLEANED


def test_a_long_text_streams_and_gives_the_batches_of_the_text_file():
    text = "01😀\r\n" * 1_000_000  # read in two pieces, the first of which ends between \r and \n, and renumbered in
    Path("long.txt").write_text(text, encoding="utf-8", newline="")  # five, one of which would begin inside an emoji
    prepared("long.txt")
    (a, tokenizer), (b, same_tokenizer) = (gpt.load_data(tiny(data=data)) for data in ("long.txt", "out"))
    assert tokenizer.chars == same_tokenizer.chars and isinstance(b["train"], np.memmap)
    assert tokenizer.decode(np.concatenate([b["train"], b["val"]])) == text.replace("\r\n", "\n") + END
    for split in ("train", "val"):
        assert np.array_equal(a[split], b[split])
        starts = np.array([0, 3, len(a[split]) - 9])
        assert_same(*[gpt.get_batch(data[split], tiny(), starts) for data in (a, b)])


def test_sample_and_val_fraction_and_min_count():
    documents = [f"number {i} \u2603" for i in range(40)] + ["rare é"]
    Path("a.tar").write_bytes(tar(owt(documents, 1)))
    first, again, other = (sum(prepared("a.tar", "--sample", "0.25", "--seed", seed)[:2], []) for seed in "335")
    assert 10 <= len(first) <= 11 and set(first) < set(documents) and first == again != other
    train, val, corpus = prepared("a.tar", "--min_count", "2", "--val_fraction", "0.5")
    assert len(train) == 20 and val[-1] == f"r{UNK}re {UNK}" and corpus["unknown"] == 2
    Path("many.txt").write_text("".join(map(chr, range(0x10000, 0x22000))), encoding="utf-8")  # past 16 bits
    refused(prepare_owt.main, ["many.txt", "--out", "many"], "--min_count")


def test_hostile_archives_write_nothing_elsewhere():
    hostile = [("/abs.txt", "absolute"), ("../up.txt", "parent"), ("empty.txt", b""), ("x" * 300 + ".txt", "long name"),
               *((f"no file {kind}.txt", kind.encode()) for kind in "12345"), ("last.txt", "last")]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shards = [("../../evil_data.xz", lzma.compress(tar(hostile, format=kind))), ("/dev/null", b"3"), ("a.md", "no")]
        for files in (shards, hostile):
            Path("a.tar").write_bytes(tar(files, format=kind))
            before = {*Path().rglob("*"), *Path("..").glob("*")}
            assert sum(prepared("a.tar")[:2], []) == ["absolute", "parent", "long name", "last"]
            assert all(str(path).startswith("out") for path in {*Path().rglob("*"), *Path("..").glob("*")} - before)


def test_truncation_anywhere_is_an_error_and_an_old_folder_stays():
    whole, shard = tar(owt()), owt()[0][1]
    Path("good.tar").write_bytes(whole)
    prepared("good.tar")
    used, second = len(whole.rstrip(b"\0")), 512 + -(-len(shard) // 512) * 512
    cases = [("cut.tar", whole[:n]) for n in (0, 100, 512, 700, used // 2, used - 1, -(-used // 512) * 512)]
    for name, data in (("cut_data.xz", shard), ("cut.tar.xz", lzma.compress(whole))):
        cases += [(name, data[:n]) for n in (10, 20, len(data) // 2, len(data) - 1)]
    for place in (512, 512 + len(shard) // 2, second):  # in the content of a member, and in the header of another
        cases.append(("flipped.tar", whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]))
    for name, data in cases:
        Path(name).write_bytes(data)
        refused(prepare_owt.main, [name, "--out", "out"], name, "subset-" * (name[-4:] == ".tar" and len(data) > 511))


def test_killed_preparation_leaves_nothing_that_gpt_accepts():
    Path("a.tar").write_bytes(tar(owt(["x" * 5_000_000] * 20, 1)))
    prepared("book.txt")
    before, process = contents("out"), start([*PREPARE, "a.tar", "--out", "out"])
    while not (begun := [*Path().glob("out.*.tmp/train.bin")]):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert contents("out") == before
    refused(gpt.main, ["--data", str(begun[0].parent)], "vocab.json")
    prepared("a.tar")
    assert len([*Path().glob("out.*")]) == 1 and trained(data="out")["step"] == 6


def test_readme_lists_every_flag_and_every_lesson_has_its_home():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"| `--{field.name}` |" in readme for field in gpt.fields(Config))
    course = readme.partition("## The course")[2].partition("\n## ")[0]
    homes = re.findall(r"^\| .+ \| ((?:`[^`]+`(?:, )?)+) \|$", course, re.MULTILINE)
    assert len(homes) >= 25
    for name in re.findall(r"`([^`]+)`", " ".join(homes)):
        file, _, path = name.rpartition(":")
        reduce(getattr, path.split("."), {"": gpt, "chat.py": chat, "prepare_owt.py": prepare_owt}[file])
    assert set(re.findall(r"`(test_\w+)`", readme)) - {"test_gpt"} <= globals().keys()
