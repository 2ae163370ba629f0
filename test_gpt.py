"""Every claim of the README, as a short test: python -m pytest -q

A test is a claim, its name, and the proof. The models are tiny, so that each takes a second or two.
"""
import copy, io, json, lzma, math, os, pickle, pty, random, re, resource, select, signal
import socket, subprocess, sys, tarfile, time, tracemalloc
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # for models so tiny, more threads cost more than they give
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import chat, gpt, prepare_owt
from gpt import END, UNK, CharTokenizer, Config

HERE = Path(__file__).parent
WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat.\n", "dog ", "ran "]
TEXT = "".join(random.Random(0).choices(WORDS, k=1000))
TINY = dict(data="book.txt", batch_size=4, block_size=8, n_embd=16, n_head=2, n_layer=2,
            dropout=0.0, max_iters=6, warmup_iters=2, eval_interval=3, eval_iters=2, device="cpu")
PAIRS = {"the cat": "sat", "a dog": "ran", "on a mat": "the dog", "é": "cat"}  # no "é" in TEXT


def too_long(number, frame):
    raise TimeoutError("this test took more than three minutes")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    """Each test runs in an empty folder with a book, with Ctrl-C as in a terminal, and fails after
    three minutes."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT, encoding="utf-8")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGINT, before)


def tiny(**changes):
    """A Config with tiny sizes."""
    return Config(**{**TINY, **changes})


def flags(**changes):
    """The same settings as words of a command line."""
    words = []
    for name, value in {**TINY, **changes}.items():
        words += [f"--{name}", str(value)]
    return words


def tiny_model(vocab_size=11, **changes):
    """An untrained model with the same weights every time."""
    torch.manual_seed(0)
    return gpt.GPT(tiny(**changes), vocab_size).eval()


def train_tiny(**changes):
    """Trains and returns the checkpoint."""
    config = tiny(**changes)
    gpt.train(config)
    return gpt.load_checkpoint(config.out)


def start(script, words):
    """A script of ours as a process."""
    return subprocess.Popen([sys.executable, HERE / script, *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script, words, **options):
    """The same, to its end."""
    return subprocess.run([sys.executable, HERE / script, *words], capture_output=True, text=True,
                          timeout=120, **options)


def files_in(folder="."):
    """{path: content} of all files below a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_refused(main, words, *named):
    """main(words) ends with status 2 and one line that names all it must; no file has changed."""
    before = files_in()
    stderr = io.StringIO()
    with redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        main(words)
    message = stderr.getvalue()
    assert stop.value.code == 2
    assert message.count("\n") == 1 and "Traceback" not in message
    for name in named:
        assert name in message
    assert files_in() == before


def assert_same(a, b):
    """Equal to the last bit, through dicts and lists."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def random_text(seed, longest):
    """Characters from all of Unicode, a third of them ASCII."""
    rng = random.Random(seed)
    ranges = [(0, 128), (128, 0xD800), (0xE000, 0x110000)]
    length = rng.randrange(1, longest)
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def pair(prompt, completion):
    """A line of a .jsonl."""
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"


# ------------------------------------------------------------------------------ tokenizer and data

@pytest.mark.parametrize("seed", range(20))
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


def split_texts(data, block_size):
    """The train and the val split of some data, decoded."""
    splits, tokenizer = gpt.load_data(tiny(data=data, block_size=block_size))
    return tokenizer.decode(splits["train"]), tokenizer.decode(splits["val"])


def test_a_text_is_cleaned_and_its_last_tenth_is_for_validation():
    Path("odd.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xff\x03" + b"x" * 91)  # 100 with END
    train, val = split_texts("odd.txt", block_size=4)
    assert train == f"one\ntwo{UNK}{UNK}" + "x" * 81
    assert val == "x" * 10 + END


def test_pairs_become_documents_and_are_split_between_them():
    Path("pairs.jsonl").write_text((pair("a", "b") + pair("c\x03", "d\r\ne")) * 5)
    train, val = split_texts("pairs.jsonl", block_size=3)
    assert train == f"a\nb{END}c{UNK}\nd\ne{END}" * 4 + f"a\nb{END}"
    assert val == f"c{UNK}\nd\ne{END}"


def test_a_line_of_pairs_ends_at_a_line_feed_and_nowhere_else():
    Path("pairs.jsonl").write_bytes(('{"prompt": "a\u2028", "completion": "b"}\r\n' * 20).encode())
    train, val = split_texts("pairs.jsonl", block_size=3)
    assert (train + val).split(END) == ["a\u2028\nb"] * 20 + [""]


def test_a_few_pairs_are_repeated_until_a_block_fits():
    Path("pairs.jsonl").write_text(pair("a", "b") * 5)
    train, val = split_texts("pairs.jsonl", block_size=50)
    assert val == f"a\nb{END}" * 13  # 52 characters
    assert train == f"a\nb{END}" * 16


def test_the_share_of_pairs_longer_than_a_block_is_printed(capsys):
    Path("pairs.jsonl").write_text(pair("a", "b") * 6 + pair("a" * 20, "b") * 4)
    gpt.train(tiny(data="pairs.jsonl"))
    assert "40.0% of pairs longer than block_size" in capsys.readouterr().out


def test_default_corpus_needs_no_download():
    splits, tokenizer = gpt.load_data(Config())
    text = tokenizer.decode(splits["train"])
    assert len(text) > 200_000
    assert "statement" in text and END in text


@pytest.mark.parametrize("block_size, batch_size, spare", [(1, 1, 1), (7, 3, 1), (19, 8, 30)])
def test_batches_are_shifted_by_one_and_stay_in_their_split(block_size, batch_size, spare):
    config = tiny(block_size=block_size, batch_size=batch_size)
    data = np.arange(block_size + spare, dtype=np.uint16)
    for _ in range(20):
        x, y = gpt.get_batch(data, config)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (batch_size, block_size)
        assert torch.equal(y, x + 1)
        assert x.min() >= 0 and y.max() < len(data)


def test_the_first_and_the_last_possible_block_are_both_drawn():
    firsts = set()
    for _ in range(50):
        x, y = gpt.get_batch(np.arange(4), tiny(block_size=2))
        firsts.add(x[0, 0].item())
    assert firsts == {0, 1}


def own_memory():
    """KiB of memory that belong to this process alone (a mapped file's pages do not)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_memory_follows_neither_the_size_of_the_file_nor_the_number_of_batches():
    config = tiny(batch_size=64, block_size=256)
    large = np.memmap("large.bin", np.uint16, "w+", shape=10**9)  # a sparse file of 2 GB
    gpt.get_batch(large, config)
    before = own_memory()
    tracemalloc.start()
    for _ in range(200):
        gpt.get_batch(large, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert own_memory() - before < 20 * 1024
    assert peak < 20 * 2**20


# ------------------------------------------------------------------------------------------- model

def test_the_fast_attention_is_the_one_written_out():
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    head = gpt.Head()
    assert torch.allclose(head.written_out(q, k, v), head(q, k, v), atol=1e-6)


def test_a_block_adds_and_then_norms():
    block, x = tiny_model().blocks[0], torch.randn(2, 8, 16)
    middle = block.norm1(x + block.attention(x))
    assert torch.allclose(block(x), block.norm2(middle + block.feedforward(middle)), atol=1e-6)


def test_feedforward_is_linear_relu_linear_and_dropout():
    layers = [type(layer).__name__ for layer in tiny_model().blocks[0].feedforward]
    assert layers == ["Linear", "ReLU", "Linear", "Dropout"]


@pytest.mark.parametrize("t", range(1, 8))
def test_the_future_never_changes_the_past(t):
    model, index = tiny_model(), torch.randint(11, (2, 8))
    changed = index.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 11
    assert torch.allclose(model(index)[0][:, :t], model(changed)[0][:, :t], atol=1e-6)


@pytest.mark.parametrize("n_layer, the_past_counts", [(2, True), (0, False)])
def test_the_past_changes_the_future_unless_there_is_no_attention(n_layer, the_past_counts):
    model, index = tiny_model(n_layer=n_layer), torch.randint(11, (2, 8))
    changed = index.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    same = torch.allclose(model(index)[0][:, -1], model(changed)[0][:, -1])
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
    model(x, y)[1].backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.any()


def test_a_text_longer_than_a_block_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="9 characters .* block_size is 8"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.int64))


class OneDevice(TorchDispatchMode):
    """Fails if an operation makes a tensor elsewhere than on the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result)
                   if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), function
        return result


def test_everything_is_computed_on_the_device_of_the_model():
    with torch.device("meta"):
        model = tiny_model(dropout=0.1).train()
        x, y = torch.zeros(2, 4, 8, dtype=torch.int64)
    with OneDevice():
        model(x, y)[1].backward()
        model(x[:, :1], cache={})
    with pytest.raises(AssertionError), OneDevice():  # the check itself can fail
        model.tokens(x) + torch.zeros(1)


# -------------------------------------------------------------------------------------- generation

def stream_with_logits(model, index, *options):
    """(the text, the logits of the last position at each step) of a generation."""
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output[0][:, -1]))
    torch.manual_seed(1)
    text = model.generate(index, *options)
    hook.remove()
    return text, seen


@pytest.mark.parametrize("seed", range(25))
def test_cached_logits_equal_uncached_inside_the_window_and_after_each_slide(seed):
    rng = random.Random(seed)
    T, heads, vocab_size = rng.randint(1, 12), rng.choice([1, 2, 4]), rng.randint(2, 30)
    layers = rng.randint(0, 3)
    model = tiny_model(vocab_size, block_size=T, n_head=heads, n_embd=8 * heads, n_layer=layers)
    index = torch.randint(vocab_size, (rng.randint(1, 3), rng.randint(1, 30)))
    options = rng.randint(0, 40), rng.choice([0, 0.5, 1.0, 5.0]), rng.choice([None, 1, 5, 100])

    text, seen = stream_with_logits(model, index, *options)

    assert len(seen) == options[0]
    assert text.dtype == torch.int64 and text.shape == (len(index), index.shape[1] + options[0])
    assert 0 <= text.min() and text.max() < vocab_size
    first = max(0, index.shape[1] - T)  # of the window, which slides to its last half when full
    for end, logits in enumerate(seen, start=index.shape[1]):
        if end - first > T:
            first = end - max(1, T // 2)
        assert torch.allclose(logits, model(text[:, first:end])[0][:, -1], atol=1e-5)


def test_generate_is_stream_joined():
    model, index = tiny_model(), torch.randint(11, (2, 3))
    torch.manual_seed(1)
    parts = list(model.stream(index, 20))
    torch.manual_seed(1)
    assert torch.equal(model.generate(index, 20), torch.cat([index, *parts], dim=1))


@pytest.mark.parametrize("options", [dict(top_k=1), dict(temperature=0), dict(temperature=1e-5)])
def test_top_1_and_temperature_0_take_the_likeliest(options):
    model, index = tiny_model(), torch.randint(11, (3, 20))  # longer than block_size
    text = model.generate(index, 10, **options)
    assert torch.equal(text[:, 20], model(text[:, 12:20])[0][:, -1].argmax(-1))
    assert torch.equal(text, model.generate(index, 10, temperature=0))


def test_top_k_draws_the_k_likeliest_and_no_others():
    model, index = tiny_model(), torch.randint(11, (1, 8))
    likeliest = model(index)[0][0, -1].topk(3).indices.tolist()
    drawn = {model.generate(index, 1, 5.0, top_k=3)[0, -1].item() for _ in range(100)}
    assert drawn == set(likeliest)


def test_generation_from_nothing_is_refused():
    with pytest.raises(IndexError):
        tiny_model().generate(torch.zeros(1, 0, dtype=torch.int64), 1)


# ---------------------------------------------------------------------------------------- learning

def test_estimate_loss_is_the_same_every_time_and_leaves_no_trace():
    splits, tokenizer = gpt.load_data(tiny())
    model = tiny_model(tokenizer.vocab_size, dropout=0.5).train()
    first = gpt.estimate_loss(model, splits, tiny())
    assert first == gpt.estimate_loss(model, splits, tiny())
    assert first.keys() == {"train", "val"}
    assert first["val"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_for_training_alone():
    model, index = tiny_model(dropout=0.5), torch.randint(11, (4, 8))
    assert torch.equal(model(index)[0], model(index)[0])
    model.train()
    assert not torch.equal(model(index)[0], model(index)[0])


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    config = tiny(learning_rate=1.0, warmup_iters=10, max_iters=110)
    rates = [gpt.learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_only_matrices_decay(kind):
    model = tiny_model()
    optimizers = gpt.make_optimizers(model, tiny(optimizer=kind, weight_decay=0.3))
    moved = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moved.append(id(parameter))
                assert (group["weight_decay"] == 0.3) == (parameter.ndim == 2)
    assert sorted(moved) == sorted(id(parameter) for parameter in model.parameters())


def test_muon_moves_the_matrices_of_the_blocks():
    model = tiny_model()
    muon = gpt.make_optimizers(model, tiny(optimizer="muon"))[1]
    moved = {id(parameter) for parameter in muon.param_groups[0]["params"]}
    assert moved == {id(p) for p in model.blocks.parameters() if p.ndim == 2}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_model_without_attention_trains_too(kind):
    losses = train_tiny(optimizer=kind, n_layer=0, max_iters=30)["losses"]
    assert losses[30]["val"] < losses[0]["val"]


def losses_of_steps(batch_size, grad_accum):
    """Six training steps -> (their losses, all weights after them)."""
    config = tiny(batch_size=batch_size, grad_accum=grad_accum, weight_decay=0.1)
    splits, tokenizer = gpt.load_data(config)
    model, optimizers, fast = gpt.build(config, tokenizer.vocab_size)
    losses = []
    for step in range(6):
        batches = list(gpt.draw_batches(splits["train"], config, step))
        losses.append(gpt.training_step(fast, optimizers, batches, config, step).item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_four_batches_of_8_are_one_of_32():
    losses, weights = losses_of_steps(batch_size=8, grad_accum=4)
    expected_losses, expected_weights = losses_of_steps(batch_size=32, grad_accum=1)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert torch.allclose(weights, expected_weights, atol=1e-4)
    assert losses[-1] < losses[0]


# -------------------------------------------------------------------------- runs and their resuming

def test_one_watches_it_learn_on_one_line_an_evaluation(capsys):
    gpt.train(tiny())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    for line in lines:
        match = re.fullmatch(r"step +\d+   train \d\.\d{4}   val \d\.\d{4}   (.+)", line)
        assert len(match[1]) > 30
        assert len(line) <= 120


def test_what_is_printed_leaves_the_run_as_it_was(monkeypatch):
    shown = train_tiny(out="shown.pkl", dropout=0.2)
    monkeypatch.setattr(gpt, "sample", lambda model, tokenizer, length: "")
    silent = train_tiny(out="silent.pkl", dropout=0.2)
    assert_same(shown["model"], silent["model"])


def fail_at(step_to_fail):
    """A training_step that fails at one step, as a power cut would."""
    original = gpt.training_step

    def training_step(model, optimizers, batches, config, step):
        if step == step_to_fail:
            raise ZeroDivisionError
        return original(model, optimizers, batches, config, step)

    return training_step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(optimizer, monkeypatch):
    settings = dict(optimizer=optimizer, dropout=0.2, grad_accum=2, max_iters=8)
    whole = train_tiny(**settings, out="whole.pkl")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gpt, "training_step", fail_at(4))
        train_tiny(**settings)
    assert gpt.load_checkpoint("book.pkl")["step"] == 3  # the last evaluation

    resumed = train_tiny(**settings)

    for key in ("model", "optimizer", "losses", "best", "step"):
        assert_same(whole[key], resumed[key])
    assert whole["corpus"] == resumed["corpus"]


def test_another_seed_is_another_model():
    one = train_tiny(out="one.pkl", seed=1)["model"]["lm_head.weight"]
    two = train_tiny(out="two.pkl", seed=2)["model"]["lm_head.weight"]
    assert not torch.equal(one, two)


def test_each_micro_batch_of_each_step_has_a_seed_of_its_own():
    splits, _ = gpt.load_data(tiny())
    seeds = set()
    for step in range(5):
        for seed, x, y in gpt.draw_batches(splits["train"], tiny(grad_accum=3), step):
            seeds.add(seed)
    assert len(seeds) == 15


def test_two_processes_train_what_one_trains():
    settings = dict(grad_accum=2, dropout=0.3, max_iters=20, eval_interval=20, learning_rate=3e-3)
    one = train_tiny(**settings, out="one.pkl")["model"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [sys.executable, *torchrun, HERE / "gpt.py", *flags(**settings, out="two.pkl")]
    process = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("step     20") == 1  # one of them prints
    two = gpt.load_checkpoint("two.pkl")["model"]
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-4)


def test_processes_on_machines_with_disks_of_their_own_resume_from_process_0():
    gpt.train(tiny(grad_accum=2))
    checkpoint = Path("book.pkl").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])  # one that nobody uses
    processes = []
    for rank in ("0", "1"):
        machine = Path(f"machine{rank}")
        machine.mkdir()
        (machine / "book.txt").write_text(TEXT)
        env = dict(os.environ, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port)
        words = flags(grad_accum=2, max_iters=12)
        processes.append(subprocess.Popen([sys.executable, HERE / "gpt.py", *words], cwd=machine,
                                          env=env, stdout=subprocess.PIPE, text=True))
        if rank == "0":
            (machine / "book.pkl").write_bytes(checkpoint)
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert not Path("machine1/book.pkl").exists()
    two = gpt.load_checkpoint("machine0/book.pkl")
    assert two["step"] == 12
    one = train_tiny(grad_accum=2, max_iters=12)
    for name in one["model"]:
        assert torch.allclose(one["model"][name], two["model"][name], atol=1e-4)


def test_ctrl_c_saves_after_the_step_and_the_same_command_carries_on():
    settings = dict(max_iters=300, eval_interval=300, dropout=0.1)
    process = start("gpt.py", flags(**settings))
    for line in process.stdout:
        if line.startswith("step"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
    assert "the same command carries on" in output
    stopped = gpt.load_checkpoint("book.pkl")["step"]
    assert 0 < stopped < 300

    resumed = run("gpt.py", flags(**settings))

    for shown in (f"at step {stopped} of", "step    300", "losses", "▁", '--model "book.pkl"'):
        assert shown in resumed.stdout
    whole = train_tiny(**settings, out="whole.pkl")
    assert_same(gpt.load_checkpoint("book.pkl")["model"], whole["model"])


def test_asked_to_stop_a_second_time_it_ends_at_once():
    code = ("import gpt, os, signal; signal.signal(signal.SIGTERM, gpt.ask_to_stop); "
            "os.kill(os.getpid(), signal.SIGTERM); print('asked', len(gpt.STOP), flush=True); "
            "os.kill(os.getpid(), signal.SIGTERM); print('asked again')")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert process.stdout == "asked 1\n"
    assert process.returncode == -signal.SIGTERM


def test_the_command_line_takes_both_signals_and_a_notebook_keeps_its_own(monkeypatch):
    during = []

    def look(*arguments):
        during.append(signal.getsignal(signal.SIGINT))
        during.append(signal.getsignal(signal.SIGTERM))
        return {"train": 1.0, "val": 1.0}

    monkeypatch.setattr(gpt, "estimate_loss", look)
    before = signal.getsignal(signal.SIGTERM)
    gpt.train(tiny(out="notebook.pkl", max_iters=0))
    gpt.main(flags(max_iters=0))
    signal.signal(signal.SIGTERM, before)
    assert during == [signal.default_int_handler, before, gpt.ask_to_stop, gpt.ask_to_stop]


def test_a_finished_run_says_so_and_its_file_is_not_touched(capsys):
    gpt.train(tiny())
    before = files_in()
    capsys.readouterr()
    gpt.main(flags())
    assert "at step 6 of 6" in capsys.readouterr().out
    assert files_in() == before


def test_killed_at_any_instant_the_run_ends_as_if_it_had_not_been():
    settings = dict(max_iters=80, eval_interval=2, eval_iters=1, dropout=0.1)
    whole = train_tiny(**settings, out="whole.pkl")
    for _ in range(int(os.environ.get("KILLS", 3))):
        process = start("gpt.py", flags(**settings))
        process.stdout.readline()  # it has begun
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.communicate()
        if Path("book.pkl").exists() and gpt.load_checkpoint("book.pkl")["step"] == 80:
            Path("book.pkl").unlink()  # it had ended: from the start again
    final = train_tiny(**settings)
    for key in ("model", "optimizer", "losses", "best"):
        assert_same(final[key], whole[key])


def test_what_a_killed_save_left_behind_is_removed_by_the_next_run():
    process = start("gpt.py", ["--help"])
    process.communicate()
    ended = Path(f"book.pkl.{process.pid}.tmp")
    alive = Path(f"book.pkl.{os.getppid()}.tmp")
    ended.write_text("half a checkpoint")
    alive.write_text("another run is writing this")
    gpt.train(tiny())
    assert not ended.exists()
    assert alive.exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else():
    gpt.train(tiny())
    before = files_in()
    half = Path("book.pkl").stat().st_size // 2
    process = start("gpt.py", flags(max_iters=9))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1 and "book.pkl" in errors
    assert files_in() == before


def test_two_runs_at_once_and_the_file_always_loads():
    words = flags(max_iters=20, eval_interval=1, eval_iters=1)
    processes = [start("gpt.py", words), start("gpt.py", words)]
    loads = 0
    while processes[0].poll() is None or processes[1].poll() is None:
        if Path("book.pkl").exists():
            gpt.load_checkpoint("book.pkl")
            loads += 1
    assert loads > 5
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0 and not errors
    assert not list(Path().glob("*.tmp"))


def train_with_val_losses(monkeypatch, losses, **changes):
    """A checkpoint whose evaluations gave these validation losses."""
    rows = [{"train": 1.0, "val": loss} for loss in losses]
    monkeypatch.setattr(gpt, "estimate_loss", Mock(side_effect=rows))
    return train_tiny(**changes)


def test_of_a_text_the_best_weights_are_kept_and_loaded(monkeypatch):
    saved = train_with_val_losses(monkeypatch, [3.0, 1.0, 2.0])
    model, tokenizer, config = gpt.load_model("book.pkl")
    assert not torch.equal(saved["best"]["lm_head.weight"], saved["model"]["lm_head.weight"])
    assert_same(dict(model.state_dict()), dict(saved["best"]))
    assert not model.training
    assert tokenizer.chars == saved["chars"]
    assert config.n_embd == 16


def test_of_pairs_the_latest_weights_are_loaded(monkeypatch):
    Path("pairs.jsonl").write_text(pair("the cat", "sat") * 20)
    saved = train_with_val_losses(monkeypatch, [3.0, 1.0, 2.0], data="pairs.jsonl")
    assert_same(dict(saved["best"]), dict(saved["model"]))
    model, _, _ = gpt.load_model("pairs.pkl")
    assert_same(dict(model.state_dict()), dict(saved["model"]))


def test_fine_tuning_starts_from_the_best_weights_and_the_architecture(monkeypatch):
    losses = [3.0, 1.0, 2.0, 2.0]  # the last one is for the run that starts from the base
    saved = train_with_val_losses(monkeypatch, losses, out="base.pkl", n_embd=32)
    words = dict(init_from="base.pkl", data="book.txt", max_iters=0, device="cpu")
    config = gpt.choose_settings(words)
    assert (config.n_embd, config.n_layer, config.block_size) == (32, 2, 8)
    assert config.eval_interval == 150  # nothing else is handed down
    gpt.train(config)
    tuned = gpt.load_checkpoint("book.pkl")
    assert_same(dict(tuned["model"]), dict(saved["best"]))
    assert tuned["step"] == 0


# ------------------------------------------------------------------------------ foreign checkpoints

class Bomb:
    """A pickle that makes a file when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


def remove(*path):
    """A change of a checkpoint that takes out what lies at the path."""
    return path, None


DAMAGES = [
    remove("config"), remove("chars"), remove("corpus"), remove("step"), remove("losses"),
    remove("model"), remove("best"), remove("optimizer"), remove("model", "tokens.weight"),
    remove("optimizer", 0, 0, "exp_avg"),
    (("best", "x"), torch.zeros(1)),
    (("model", "tokens.weight"), torch.zeros(1, 16)),
    (("best", "tokens.weight"), torch.zeros(1, 16)),
    (("best",), {}),
    (("step",), "x"),
    (("step",), Bomb()),
    (("losses",), [1]),
    (("config", "n_head"), "x"),
    (("config", "x"), 1),
    (("config", "n_embd"), 2**30),
    (("config", "n_layer"), 10**9),
    (("optimizer", 0, 0, "exp_avg"), torch.tensor(0.0)),
    (("optimizer", 0, 0, "exp_avg"), torch.zeros(1, 1)),
    (("optimizer", 0, 0, "step"), torch.zeros(0)),
]


def assert_refused_everywhere(path):
    """Training on, fine-tuning and chatting all refuse a file, and run nothing of it."""
    assert_refused(gpt.main, flags(out=path), path)
    assert_refused(gpt.main, flags(init_from=path, out="new.pkl"), path)
    assert_refused(chat.main, ["--model", path, "--prompt", "a"], path)
    assert not Path("boom").exists()


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory):
    """The file of a trained model."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "book.txt").write_text(TEXT)
    gpt.train(tiny(data=str(folder / "book.txt"), out=str(folder / "good.pkl")))
    return folder / "good.pkl"


@pytest.mark.parametrize("path, value", DAMAGES)
def test_a_doctored_checkpoint_is_refused(path, value, good_checkpoint):
    checkpoint = gpt.load_checkpoint(good_checkpoint)
    place = checkpoint
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    torch.save(checkpoint, "bad.pkl")
    assert_refused_everywhere("bad.pkl")


@pytest.mark.parametrize("content", [b"", b"x" * 5000, pickle.dumps(Bomb()), pickle.dumps({})])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(content):
    Path("bad.pkl").write_bytes(content)
    assert_refused_everywhere("bad.pkl")


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_checkpoint_that_was_cut_off_is_refused(share, good_checkpoint):
    data = good_checkpoint.read_bytes()
    Path("bad.pkl").write_bytes(data[: int(share * len(data))])
    assert_refused_everywhere("bad.pkl")


# ---------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("name, value", [
    ("n_layer", 2.9), ("compile", "False"), ("data", None), ("seed", "1"), ("dropout", "0.1"),
    ("n_embd", True)])
def test_a_setting_of_the_wrong_kind_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        Config(**{name: value})


# One command line each, and what the message must name. The sizes of TINY are added.
MISTAKES = [
    ("--n_embd 0", "n_embd"), ("--n_embd -4", "n_embd"), ("--n_embd 1.5", "n_embd"),
    ("--n_embd x", "n_embd"), ("--n_embd", "n_embd"), ("--n_embd 15", "n_head"),
    ("--n_head 3", "n_head"), ("--n_head 0", "n_head"), ("--n_layer -1", "n_layer"),
    ("--n_layer 100000", "n_layer"), ("--batch_size 0", "batch_size"),
    ("--block_size 0", "block_size"), ("--block_size 5000", "block_size"),
    ("--grad_accum 0", "grad_accum"), ("--max_iters -1", "max_iters"),
    ("--warmup_iters -1", "warmup_iters"), ("--dropout 1", "dropout"),
    ("--dropout -0.1", "dropout"), ("--dropout nan", "dropout"),
    ("--eval_interval 0", "eval_interval"), ("--eval_iters 0", "eval_iters"),
    ("--learning_rate -1", "learning_rate"), ("--learning_rate nan", "learning_rate"),
    ("--learning_rate inf", "learning_rate"), ("--weight_decay -1", "weight_decay"),
    ("--grad_clip -1", "grad_clip"), ("--seed -1", "seed"), ("--seed 1e3", "seed"),
    ("--optimizer sgd", "sgd"), ("--dtype float16", "float16"), ("--device tpu", "tpu"),
    ("--device cuda:99", "cuda:99"), ("--compile=yes", "compile"), ("--colour red", "--colour"),
    ("--n_emb 16", "--n_emb"), ("stray", "stray"), ("--out .", "."),
    ("--out nowhere/model.pkl", "nowhere"), ("--init_from nothing.pkl", "nothing.pkl"),
    ("--init_from book.txt", "book.txt"), ("--data nothing.txt", "nothing.txt"),
    ("--data empty.txt", "empty.txt"), ("--data short.txt", "short.txt"),
    ("--data empty.jsonl", "empty.jsonl"), ("--data one.jsonl", "one.jsonl"),
    ("--data bad.jsonl", "bad.jsonl, line 3"), ("--data wrong.jsonl", "wrong.jsonl, line 2"),
    ("--data list.jsonl", "list.jsonl, line 1"), ("--data folder", "vocab.json"),
]
BAD_FILES = {
    "empty.txt": "", "short.txt": "abc", "empty.jsonl": "", "one.jsonl": pair("a", "b"),
    "bad.jsonl": pair("a", "b") * 2 + "{", "wrong.jsonl": pair("a", "b") + '{"prompt": "a"}',
    "list.jsonl": "[1]\n", "folder/train.bin": "",
}


@pytest.fixture
def bad_files():
    for name, content in BAD_FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)


@pytest.mark.parametrize("words, named", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(words, named, bad_files):
    assert_refused(gpt.main, [*flags(), *words.split()], named)


def test_a_mistake_is_the_same_for_a_process():
    process = run("gpt.py", flags(n_embd=15))
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "n_head" in process.stderr


def test_weights_that_are_no_numbers_end_the_run_and_are_not_saved(monkeypatch):
    gpt.train(tiny())

    def explode(model, optimizers, batches, config, step):
        model.lm_head.bias.data.fill_(math.nan)
        return torch.zeros(())

    monkeypatch.setattr(gpt, "training_step", explode)
    assert_refused(gpt.main, flags(max_iters=9), "step 9", "--learning_rate")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nMore"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   MemoryError()])
def test_out_of_memory_is_one_line_with_advice(error, monkeypatch):
    gpt.train(tiny(batch_size=64))
    monkeypatch.setattr(gpt, "training_step", Mock(side_effect=error))
    assert_refused(gpt.main, flags(max_iters=9, batch_size=64), "--batch_size 32 --grad_accum 2")


def test_a_compiler_that_fails_is_one_line_that_says_no_compile(monkeypatch):
    gpt.train(tiny())
    error = torch._dynamo.exc.InternalTorchDynamoError("no compiler here\nat all")
    monkeypatch.setattr(gpt, "training_step", Mock(side_effect=error))
    assert_refused(gpt.main, [*flags(max_iters=9), "--compile"], "--no-compile", "no compiler here")


@pytest.mark.parametrize("name, old, new", [
    ("n_embd", 16, 32), ("n_layer", 2, 1), ("n_head", 2, 4), ("block_size", 8, 4),
    ("optimizer", "adamw", "muon"), ("seed", 1337, 5)])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(name, old, new):
    gpt.train(tiny())
    assert_refused(gpt.main, flags(**{name: new}), f"{name} {old}, not {new}", "--out")


def test_another_text_than_the_checkpoints_is_refused():
    gpt.train(tiny())
    Path("other.txt").write_text(TEXT + "!")
    words = flags(data="other.txt", out="book.pkl")
    assert_refused(gpt.main, words, "corpus", "--out")


def test_a_folder_with_another_vocabulary_is_refused():
    gpt.train(tiny())
    Path("other.txt").write_text(TEXT + "!")
    prepare_owt.main(["other.txt", "--out", "other"])
    assert_refused(gpt.main, flags(data="other", out="book.pkl"), "other", "chars")
    assert_refused(gpt.main, flags(data="other", init_from="book.pkl", out="new.pkl"), "chars")


def test_a_flag_left_out_comes_from_the_checkpoint():
    gpt.train(tiny())
    gpt.main(["--data", "book.txt", "--device", "cpu", "--max_iters", "7"])
    assert gpt.load_checkpoint("book.pkl")["step"] == 7


def test_a_checkpoint_of_a_machine_with_another_device_is_read_here():
    checkpoint = train_tiny()
    checkpoint["config"]["device"] = "mps"  # which no Linux has
    torch.save(checkpoint, "book.pkl")
    assert gpt.load_model("book.pkl")[2].device == "cpu"
    gpt.main(["--data", "book.txt", "--no-compile", "--max_iters", "7"])
    assert gpt.load_checkpoint("book.pkl")["step"] == 7
    with pytest.raises(ValueError, match="device must be .*'mps'"):
        gpt.load_model("book.pkl", "mps")


def test_micro_batches_must_be_divisible_by_the_processes(monkeypatch):
    monkeypatch.setattr(gpt, "WORLD", 2)
    with pytest.raises(ValueError, match="grad_accum 3 .* 2 processes"):
        gpt.train(tiny(grad_accum=3))


def test_tune_prints_rows_of_flags_and_the_last_line_works(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # which would take a minute
    gpt.main([*flags(grad_accum=2), "--tune"])
    *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == 12
    for row in rows:
        words = row.split()
        assert int(words[words.index("--batch_size") + 1]) * int(words[-4]) == 8
    assert not Path("book.pkl").exists()
    assert last.startswith("fastest: python gpt.py --batch_size")
    gpt.main([*flags(), *last.split()[3:]])
    assert gpt.load_checkpoint("book.pkl")["step"] == 6


def test_tune_shows_why_a_setting_failed(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler here")))
    gpt.main([*flags(), "--tune"])
    assert "failed: RuntimeError('no compiler here')" in capsys.readouterr().out


def test_bfloat16_trains():
    losses = train_tiny(dtype="bfloat16", max_iters=30)["losses"]
    assert losses[30]["val"] < losses[0]["val"]


# ------------------------------------------------------------------------------- chat: a base model

@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory):
    """The bytes of a small model's checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    Path(folder, "book.txt").write_text(TEXT)
    settings = dict(TINY, data=str(folder / "book.txt"), out=str(folder / "model.pkl"))
    gpt.train(Config(**settings, seed=1))
    return Path(folder, "model.pkl").read_bytes()


@pytest.fixture
def base(base_checkpoint):
    """model.pkl, where chat.py looks for it. Its block_size is 8."""
    Path("model.pkl").write_bytes(base_checkpoint)


@pytest.fixture
def base_chat(base):
    """A chat with the base model, whose answers have three characters."""
    return chat.Chat(*gpt.load_model("model.pkl"), max_new_tokens=3)


@pytest.mark.parametrize("prompt", ["the ", ""])
def test_prompt_is_continued_by_as_many_characters_as_were_asked_for(base, capsys, prompt):
    chat.main(["--prompt", prompt, "--max_new_tokens", "20", "--stats"])

    output, errors = capsys.readouterr()
    assert output.startswith(prompt)
    assert len(output) == len(prompt) + 20 + len("\n")
    assert "20 characters" in errors


def test_the_same_seed_gives_the_same_text_and_another_one_another(base, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        chat.main(["--prompt", "the ", "--max_new_tokens", "20", "--seed", seed])
        outputs.append(capsys.readouterr().out)

    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_into_a_pipe_goes_the_text_and_nothing_else(base, capsys):
    chat.main(["--prompt", "the ", "--max_new_tokens", "20", "--seed", "1"])
    once = capsys.readouterr().out

    process = run("chat.py", ["--max_new_tokens", "20", "--seed", "1"],
                  input="the \ncat\n/help\n/quit\ndog\n")

    assert process.returncode == 0
    assert process.stdout.startswith(once + "cat")
    assert len(process.stdout) == len("the cat") + 2 * len(" " * 20 + "\n")  # no dog: /quit
    assert "/quit" in process.stderr


def test_an_answer_is_streamed_a_character_at_a_time(base_chat):
    answer = base_chat.answer("the")

    next(answer)

    assert len(base_chat.context) == len("the") + 1


def test_the_model_reads_the_whole_conversation(base_chat):
    base_chat.model.stream = Mock(wraps=base_chat.model.stream)

    first = "".join(base_chat.answer("the"))
    second = "".join(base_chat.answer("cat"))

    index = base_chat.model.stream.call_args.args[0]  # what it got for the second answer
    read = base_chat.tokenizer.decode(index[0].tolist()).replace(END, "\n")
    kept = base_chat.tokenizer.decode(base_chat.context).replace(END, "\n")
    assert read == "the" + first + "cat"
    assert kept == "the" + first + "cat" + second


def test_clear_forgets_the_conversation(base_chat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\n/clear\n"))

    chat.talk(base_chat, stats=False)

    assert base_chat.context == []


def test_with_an_empty_line_the_text_goes_on(base_chat, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\n\n"))

    chat.talk(base_chat, stats=False)

    assert len(base_chat.context) == len("dog") + 2 * 3


def test_characters_that_the_model_has_never_seen_are_counted(base_chat, capsys):
    base_chat.show("é日a")

    assert "never seen: 2" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(base_chat, capsys):
    base_chat.show("the cat a")  # nine characters

    assert capsys.readouterr().err == "(prompt cut to its last 8 characters)\n"


def test_a_prompt_that_fills_the_context_is_not_cut(base_chat, capsys):
    base_chat.show("the cat ")

    assert capsys.readouterr().err == ""


def test_control_characters_never_reach_the_terminal(capsys):
    text = "a\x1b[2J\r\x00\x9b\u202e\n\tb é日😀 \u200c"
    tokenizer = CharTokenizer(text)
    model = Mock()
    model.stream.return_value = torch.tensor(tokenizer.encode(text).tolist())  # it says just that

    chat.Chat(model, tokenizer, Config(device="cpu")).show("")

    assert capsys.readouterr().out == f"a{UNK}[2J{UNK}{UNK}{UNK}{UNK}\n\tb é日😀 \u200c\n"


def test_control_characters_of_a_prompt_do_not_either(base, capsys):
    chat.main(["--prompt", "\x1b[2J", "--max_new_tokens", "1"])

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

    end = time.monotonic() + 60
    ended = (0, 0)
    while ended == (0, 0) and time.monotonic() < end:
        ended = os.waitpid(process_id, os.WNOHANG)
        time.sleep(0.1)
    assert ended == (process_id, 0)


# ------------------------------------------------------------------- chat: a model trained on pairs

FINE_TUNE = ("python gpt.py --init_from base.pkl --data pairs.jsonl --device cpu --max_iters 300 "
             "--learning_rate 5e-3 --dropout 0 --batch_size 16")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The folder of base.pkl, pairs.jsonl and pairs.pkl, which learned the answers to PAIRS; and
    what that training printed."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    prompts = random.Random(0).choices(list(PAIRS), k=200)
    lines = [json.dumps({"prompt": prompt, "completion": PAIRS[prompt]}) for prompt in prompts]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "book.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gpt.train(Config(**dict(TINY, out="base.pkl", n_embd=32, block_size=24)))
        output = io.StringIO()
        patch.setattr(sys, "stdout", output)
        gpt.main(FINE_TUNE.split()[2:])
    return folder, output.getvalue()


@pytest.fixture
def answering(fine_tuned):
    """(model, tokenizer, config) of the model that was trained on PAIRS."""
    folder, _ = fine_tuned
    return gpt.load_model(folder / "pairs.pkl")


def test_fine_tuning_keeps_vocabulary_and_architecture_and_nothing_else(fine_tuned, answering):
    folder, output = fine_tuned
    _, base_tokenizer, _ = gpt.load_model(folder / "base.pkl")
    _, tokenizer, config = answering

    assert tokenizer.chars == base_tokenizer.chars
    assert config.n_embd == 32
    assert config.eval_interval == Config.eval_interval
    assert "unknown" in output  # "é"


def test_fine_tuning_refuses_another_architecture(fine_tuned, monkeypatch):
    folder, _ = fine_tuned
    monkeypatch.chdir(folder)
    words = FINE_TUNE.split()[2:]

    assert_refused(gpt.main, [*words, "--out", "new.pkl", "--n_layer", "1"], "n_layer 2, not 1")


def test_a_model_trained_on_pairs_answers_and_stops_at_end_over_several_turns(answering):
    talk = chat.Chat(*answering, temperature=0, max_new_tokens=50)
    turns = list(PAIRS) * 2 + list(reversed(PAIRS))

    answers = ["".join(talk.answer(prompt)) for prompt in turns]

    assert answers == [PAIRS[prompt] for prompt in turns]


def test_turns_stand_in_the_context_as_pairs_did_in_training(answering):
    talk = chat.Chat(*answering, temperature=0, max_new_tokens=50)

    for prompt in ("the cat", "a dog"):
        talk.show(prompt)

    assert talk.tokenizer.decode(talk.context) == f"{END}the cat\nsat{END}a dog\nran"


def test_the_answers_alone_go_into_a_pipe(fine_tuned):
    folder, _ = fine_tuned
    process = run("chat.py", ["--model", folder / "pairs.pkl", "--temperature", "0"],
                  input="a dog\n\nthe cat\n")

    assert process.stdout == "ran\nsat\n"  # an empty line is no question


def test_one_prompt_and_its_answer_stand_on_lines_of_their_own(fine_tuned, capsys):
    folder, _ = fine_tuned
    chat.main(["--model", str(folder / "pairs.pkl"), "--temperature", "0", "--prompt", "a dog"])

    assert capsys.readouterr().out == "a dog\nran\n"


# ---------------------------------------------------------------------------- chat: 8 bits a weight

RECITED = " ".join(gpt.__doc__.split())[:200]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """(model, tokenizer, x, y): a model that learned RECITED by heart, and a batch of its text."""
    folder = tmp_path_factory.mktemp("memorised")
    path = folder / "short.txt"
    path.write_text(RECITED * 3)  # so that its end is seen as often as its middle
    changes = dict(data=str(path), out=str(folder / "short.pkl"), block_size=32, n_embd=64,
                   learning_rate=3e-3, max_iters=300, batch_size=16, warmup_iters=50,
                   eval_interval=300)
    config = Config(**dict(TINY, **changes))
    model = gpt.train(config)
    splits, tokenizer = gpt.load_data(config)
    x, y = gpt.get_batch(splits["val"], config)
    return model, tokenizer, x, y


@pytest.fixture(scope="module")
def as_int8(memorised):
    """The same model with 8 bits a weight."""
    model = copy.deepcopy(memorised[0])
    return chat.quantize(model)


@pytest.fixture(params=["fast product", "slow product"])
def product(request, monkeypatch):
    """A test runs twice: with PyTorch's product for 8 bits, and as if it had none."""
    if request.param == "slow product":
        monkeypatch.delattr(torch, "_weight_int8pack_mm")


def test_a_short_text_is_learned_by_heart(memorised):
    model, tokenizer, _, _ = memorised
    start = torch.tensor([tokenizer.encode(RECITED[:32]).tolist()])

    text = model.generate(start, 168, top_k=1)

    assert tokenizer.decode(text[0].tolist()) == RECITED


def test_8_bits_say_almost_the_same_as_32(memorised, as_int8, product):
    model, _, x, y = memorised

    with torch.no_grad():
        logits, loss = model(x, y)
        int8_logits, int8_loss = as_int8(x, y)

    assert (int8_logits - logits).abs().max() < 0.1 * logits.abs().max()
    assert int8_loss.item() == pytest.approx(loss.item(), abs=0.01)


def test_a_model_of_8_bits_generates(memorised, as_int8, product):
    _, _, x, _ = memorised

    text = as_int8.generate(x[:1], 20)

    assert text.shape == (1, 32 + 20)


def test_8_bits_take_little_more_than_a_quarter_of_the_memory(memorised, as_int8):
    sizes = []
    for model in (memorised[0], as_int8):
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))

    assert sizes[1] < 0.3 * sizes[0]


def test_every_linear_layer_gets_8_bits_and_the_rest_bfloat16(as_int8):
    kinds = [type(module) for module in as_int8.modules()]
    types = {tensor.dtype for tensor in as_int8.state_dict().values()}

    assert torch.nn.Linear not in kinds
    assert types == {torch.int8, torch.bfloat16}


def test_8_bits_are_at_most_half_a_scale_off():
    linear = torch.nn.Linear(64, 32)

    quantized = chat.Int8Linear(linear)

    error = quantized.weight * quantized.scale[:, None] - linear.weight
    assert (error.abs() <= 0.501 * quantized.scale[:, None]).all()
    assert (quantized.weight.abs().amax(dim=1) == 127).all()  # all of the range is used


def test_the_fast_product_is_the_slow_one(monkeypatch):
    linear = chat.quantize(torch.nn.Sequential(torch.nn.Linear(64, 32)))
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)

    fast = linear(x)
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    slow = linear(x)

    assert fast.shape == (2, 3, 32)
    assert torch.allclose(fast, slow, atol=0.02, rtol=0.02)


def test_rows_that_the_fast_product_would_read_past_the_end_of_get_the_slow_one(monkeypatch):
    fast = Mock()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", fast)
    model = gpt.GPT(Config(**dict(TINY, n_embd=36)), vocab_size=11)  # 36 is no multiple of 16
    linear = chat.quantize(model).lm_head

    y = linear(torch.randn(1, 3, 36, dtype=torch.bfloat16))

    assert y.shape == (1, 3, 11)
    fast.assert_not_called()


def test_chat_says_what_8_bits_save(base, capsys):
    chat.main(["--int8", "--prompt", "the ", "--max_new_tokens", "20"])

    output, errors = capsys.readouterr()
    assert len(output) == len("the ") + 20 + len("\n")
    assert re.search(r"weights: \d+\.\d MiB, as int8 \d+\.\d MiB", errors)


# ----------------------------------------------------------------------------------- chat: mistakes

@pytest.mark.parametrize("command_line, named", [
    ("python chat.py --prompt a --model nothing.pkl", "nothing.pkl"),
    ("python chat.py --prompt a --model book.txt", "book.txt"),
    ("python chat.py --prompt a --temperature -1", "temperature"),
    ("python chat.py --prompt a --temperature nan", "temperature"),
    ("python chat.py --prompt a --top_k -1", "top_k"),
    ("python chat.py --prompt a --max_new_tokens 0", "max_new_tokens"),
    ("python chat.py --prompt a --seed x", "seed"),
    ("python chat.py --prompt a --device tpu", "tpu"),
    ("python chat.py --prompt a --colour red", "--colour"),
    ("python chat.py --prompt a --mod x", "--mod"),
])
def test_a_mistake_in_chat_is_one_line_and_exit_status_2(command_line, named, base):
    assert_refused(chat.main, command_line.split()[2:], named)


def test_without_a_model_chat_says_how_to_make_one():
    process = run("chat.py", ["--prompt", "a"])

    assert process.returncode == 2
    assert process.stderr == "chat.py: model.pkl: no such model; python gpt.py makes one\n"


# ---------------------------------------------------------------------------------- prepare_owt.py

ODD = [re.sub(f"\r\n|{END}|\ufeff", "", random_text(seed, 3000)) for seed in range(13)]
DOCUMENTS = ["one\r\ntwo", "日本語 😀 e\u0301", b"bad \xff\xe2\x82 end", f"an {END}", "\ufeffmark",
             "", *ODD]
CLEANED = ["one\ntwo", "日本語 😀 e\u0301", f"bad {UNK}{UNK} end", f"an {UNK}", "mark", *ODD]


def tar(files, **options):
    """The bytes of a tar of (name, text or bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files:
            if isinstance(content, str):
                content = content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shard(documents, **options):
    """The bytes of an xz-compressed tar with a .txt for each document."""
    files = [(f"{number}.txt", document) for number, document in enumerate(documents)]
    return lzma.compress(tar(files, **options))


def owt(documents, per_shard=7):
    """OpenWebText's shape: a list of (name, bytes) of shards."""
    shards = []
    for start in range(0, len(documents), per_shard):
        name = f"openwebtext/subset-{start}_data.xz"
        shards.append((name, shard(documents[start : start + per_shard])))
    return shards


def prepare(*words):
    """Prepares, and returns the documents of both splits and corpus.json."""
    prepare_owt.main([*words, "--out", "out"])
    splits, tokenizer = gpt.load_data(tiny(data="out", block_size=1))
    train = tokenizer.decode(splits["train"]).split(END)
    val = tokenizer.decode(splits["val"]).split(END)
    assert train.pop() == "" and val.pop() == ""  # an END closes the last document too
    return train, val, json.loads(Path("out/corpus.json").read_text())


@pytest.fixture
def sources():
    """The same documents in each kind of source."""
    Path("shards.tar").write_bytes(tar(owt(DOCUMENTS)))
    Path("single.tar").write_bytes(tar(owt(DOCUMENTS, per_shard=1)))
    Path("original.tar.xz").write_bytes(lzma.compress(tar(owt(DOCUMENTS))))
    texts = [(f"{number}.txt", document) for number, document in enumerate(DOCUMENTS)]
    Path("texts.tar").write_bytes(tar(texts))
    Path("folder").mkdir()
    for number, (name, content) in enumerate(owt(DOCUMENTS)):
        Path(f"folder/{number}_data.xz").write_bytes(content)


@pytest.mark.parametrize("source", ["shards.tar", "single.tar", "original.tar.xz", "texts.tar",
                                    "folder"])
def test_every_kind_of_source_comes_back_character_for_character(source, sources):
    train, val, corpus = prepare(source)
    assert train + val == CLEANED
    assert train and val
    assert corpus["documents"] == len(CLEANED)
    assert corpus["characters"] == sum(len(text) for text in CLEANED)
    assert sorted(os.listdir("out")) == ["corpus.json", "train.bin", "val.bin", "vocab.json"]


def test_any_number_of_workers_gives_the_same_files(sources):
    results = []
    for workers in ("1", "2", "5"):
        prepare_owt.main(["shards.tar", "--out", "out", "--workers", workers, "--sample", "0.7"])
        results.append(files_in("out"))
    contents = [list(result.values()) for result in results]
    assert contents[0] == contents[1] == contents[2]


def test_plain_texts_and_compressed_ones_mix_with_shards(sources):
    Path("a_data.xz").write_bytes(lzma.compress(b"plain\r\ntext") + lzma.compress(b" goes on"))
    Path("b.txt").write_bytes("\ufeffa text\r\n".encode() + b"\xff")
    train, val, _ = prepare("shards.tar", "a_data.xz", "b.txt", "folder")
    assert train + val == [*CLEANED, "plain\ntext goes on", f"a text\n{UNK}", *CLEANED]


def test_a_long_text_gives_the_batches_of_the_text_file_itself():
    text = "x" + "01😀\r\n" * 1_000_000  # byte 2**20, where a piece ends, is between \r and \n
    Path("long.txt").write_text(text, encoding="utf-8", newline="")
    prepare_owt.main(["long.txt", "--out", "out"])
    expected, tokenizer = gpt.load_data(tiny(data="long.txt"))
    splits, same_tokenizer = gpt.load_data(tiny(data="out"))
    assert tokenizer.chars == same_tokenizer.chars
    for name in ("train", "val"):
        assert isinstance(splits[name], np.memmap)
        assert np.array_equal(splits[name], expected[name])


def test_a_sample_takes_some_shards_and_the_seed_chooses_them():
    documents = [f"number {number}" for number in range(200)]
    Path("a.tar").write_bytes(tar(owt(documents, per_shard=1)))
    chosen = []
    for seed in ("3", "3", "5"):
        train, val, _ = prepare("a.tar", "--sample", "0.25", "--seed", seed)
        chosen.append(train + val)
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert 30 < len(chosen[0]) < 70
    assert set(chosen[0]) < set(documents)


def test_rare_characters_become_unk_with_min_count():
    Path("a.tar").write_bytes(tar(owt(["common ☃"] * 40 + ["rare é"])))
    _, val, corpus = prepare("a.tar", "--min_count", "2")
    assert val[-1] == f"r{UNK}r{UNK} {UNK}"
    assert corpus["unknown"] == 3


def test_val_fraction_is_the_share_for_validation_and_cuts_between_documents():
    Path("a.tar").write_bytes(tar(owt([f"number {number:02d}" for number in range(40)])))
    train, val, _ = prepare("a.tar", "--val_fraction", "0.5")
    assert len(train) == len(val) == 20


def test_more_characters_than_16_bits_number_are_refused():
    characters = map(chr, range(0x10000, 0x22000))
    Path("many.txt").write_text("".join(characters), encoding="utf-8")
    assert_refused(prepare_owt.main, ["many.txt", "--out", "many"], "--min_count")


LATIN_1 = "é" * 200 + "n" * 51 + ".txt"  # 255 bytes in Latin-1


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "/absolute.txt", "../up.txt"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_an_archive_write_nothing_elsewhere(name, kind):
    inner = lzma.compress(tar([(name, "first"), ("last.txt", "last")], format=kind))
    Path("a.tar").write_bytes(tar([("../../evil_data.xz", inner), ("/x.txt", "more")], format=kind))
    before = set(Path("..").rglob("*"))
    train, val, _ = prepare("a.tar")
    assert train + val == ["first", "last", "more"]
    new = {path for path in set(Path("..").rglob("*")) - before if "/out" not in str(path)}
    assert not new


def test_a_latin_1_name_of_255_bytes_is_read():
    data = tar([(LATIN_1, "text")], format=tarfile.GNU_FORMAT, encoding="latin-1")
    Path("a.tar").write_bytes(tar([("a_data.xz", lzma.compress(data)), ("b.txt", "more")]))
    train, val, _ = prepare("a.tar")
    assert train + val == ["text", "more"]


def test_links_devices_and_folders_in_an_archive_hold_no_text():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (b"1", b"2", b"3", b"5", b"6"):  # two links, a device, a folder, a pipe
            member = tarfile.TarInfo(f"{kind.decode()}.txt")
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    Path("a.tar").write_bytes(buffer.getvalue())
    train, val, _ = prepare("a.tar")
    assert train + val == ["text", "text"]


WHOLE = tar(owt(DOCUMENTS))
SHARD = owt(DOCUMENTS)[0][1]
USED = len(WHOLE.rstrip(b"\0"))
DAMAGED = [("cut.tar", WHOLE[:length]) for length in (0, 100, 512, 700, USED // 2, USED - 1)]
DAMAGED += [("cut.tar", WHOLE[: -(-USED // 512) * 512])]  # the two blocks of zeros are missing
for length in (10, 20, len(SHARD) // 2, len(SHARD) - 1):
    DAMAGED += [("cut_data.xz", SHARD[:length])]
    DAMAGED += [("cut.tar.xz", lzma.compress(WHOLE)[: 10 * length])]
for place in (512, 512 + len(SHARD) // 2, 512 + -(-len(SHARD) // 512) * 512):
    DAMAGED += [("flipped.tar", WHOLE[:place] + bytes([WHOLE[place] ^ 255]) + WHOLE[place + 1 :])]


@pytest.mark.parametrize("name, content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_archive_is_refused_by_name_and_the_older_corpus_stays(name, content):
    Path("good.tar").write_bytes(WHOLE)
    prepare("good.tar")
    Path(name).write_bytes(content)
    assert_refused(prepare_owt.main, [name, "--out", "out"], name)


def test_a_damaged_shard_is_named():
    name, content = owt(DOCUMENTS)[1]
    Path("a.tar").write_bytes(tar([owt(DOCUMENTS)[0], (name, content[:-5])]))
    assert_refused(prepare_owt.main, ["a.tar", "--out", "out"], "a.tar", name)


def start_of_a_long_preparation():
    """A process of prepare_owt.py that has begun to write."""
    Path("a.tar").write_bytes(tar(owt(["x" * 5_000_000] * 20, per_shard=1)))
    process = start("prepare_owt.py", ["a.tar", "--out", "out"])
    while not list(Path().glob("out.*.tmp/new/0")):
        assert process.poll() is None
    return process


def test_a_killed_preparation_leaves_the_older_corpus_and_nothing_that_trains():
    prepare_owt.main(["book.txt", "--out", "out"])
    before = files_in("out")
    process = start_of_a_long_preparation()
    process.kill()
    process.communicate()
    assert files_in("out") == before
    leftover = next(Path().glob("out.*.tmp"))
    assert_refused(gpt.main, ["--data", str(leftover)], "vocab.json")


def is_running(pid):
    """Whether there is such a process, and not only its exit status."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_when_a_preparation_is_killed_its_workers_end_too():
    process = start_of_a_long_preparation()
    workers = []
    while not workers:
        assert process.poll() is None
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_ctrl_c_ends_a_preparation_quietly_with_nothing_left():
    process = start_of_a_long_preparation()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert sorted(os.listdir()) == ["a.tar", "book.txt"]


def test_a_prepared_folder_trains():
    prepare_owt.main(["book.txt", "--out", "out"])
    assert train_tiny(data="out")["step"] == 6


@pytest.mark.parametrize("words, named", [
    ("", "sources"), ("nothing.tar", "nothing.tar"), ("model.pkl", "model.pkl"),
    ("random.tar", "random.tar"), ("random.xz", "random.xz"), ("random.tar.xz", "random.tar.xz"),
    ("empty.txt", "no documents"), ("novocab", "no documents"), ("book.txt --seed=x", "seed"),
    ("book.txt --sample=0", "sample"), ("book.txt --sample=2", "sample"),
    ("book.txt --workers=0", "workers"), ("book.txt --val_fraction=1", "val_fraction"),
    ("book.txt --out=full", "full")])
def test_a_mistake_in_preparation_is_one_line_and_exit_status_2(words, named):
    Path("model.pkl").write_text("x")
    Path("empty.txt").write_text("")
    for name in ("random.tar", "random.xz", "random.tar.xz"):
        Path(name).write_text("x" * 600)
    for name in ("novocab/train.bin", "full/x"):
        Path(name).parent.mkdir()
        Path(name).write_text("x")
    assert_refused(prepare_owt.main, ["--out=out", *words.split()], named)


# ------------------------------------------------------------------------------------------- README

README = (HERE / "README.md").read_text(encoding="utf-8")
MODULES = {"": gpt, "chat.py": chat, "prepare_owt.py": prepare_owt}


@pytest.mark.parametrize("name", [field.name for field in gpt.fields(Config)])
def test_the_readme_lists_each_flag_with_its_meaning(name):
    source = Path(gpt.__file__).read_text("utf-8")
    line = re.search(rf"^    {name}: .*?  # (.*)$", source, re.MULTILINE)
    row = re.search(rf"^\| `--{name}` \|.*\| (.*) \|$", README, re.MULTILINE)
    assert row[1] == line[1]


def test_each_lesson_has_its_home_in_the_source():
    course = README.partition("## The course")[2].partition("Where this differs")[0]
    homes = re.findall(r"^\| [^|]+ \| (`.+`) \|$", course, re.MULTILINE)
    names = re.findall(r"`([^`]+)`", " ".join(homes))
    assert len(homes) >= 20
    for name in names:
        file, _, path = name.rpartition(":")
        home = MODULES[file]
        for part in path.split("."):
            home = getattr(home, part)
        assert home.__doc__


def test_each_promise_names_tests_that_exist():
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 15
    assert names <= globals().keys()
