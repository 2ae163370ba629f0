"""A character-level GPT in one file: it reads text one character at a time and learns to write more of it.

    python gpt.py                      train on the documentation that Python carries, then show a sample
    python gpt.py --data book.txt      train on any UTF-8 text; the same command again carries on from its checkpoint
    python gpt.py --help               every hyperparameter is a flag of the same name
    python chat.py                     talk to the model

Read it from the top: hyperparameters, tokenizer, data, model, loss estimate, checkpoints, training. It builds what the
freeCodeCamp course "Create a Large Language Model from Scratch with Python" builds. Letters in comments are sizes:
B batch (texts side by side), T time (characters in a text), C channels (n_embd numbers that describe a character),
H heads, D head size (C / H), V vocabulary.
"""
import argparse, hashlib, inspect, itertools, json, math, os, re, shlex, signal, sys, threading, time, unicodedata, warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large memory pages on Linux: faster on a CPU; read as torch loads

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------- hyperparameters

@dataclass
class Config:
    """Every setting of a run. ValueError if one makes no sense. Not learned but chosen, hence *hyper*parameters."""
    data: str = ""                # text file, .jsonl of prompt/completion pairs, or folder; "" is Python's documentation
    out: str = ""                 # checkpoint to write and to carry on from; "" is named after the data
    init_from: str = ""           # checkpoint to start a new run from (fine-tuning)
    batch_size: int = 32          # texts per micro-batch: B
    block_size: int = 128         # characters of context: T
    grad_accum: int = 1           # micro-batches per step, over all processes
    max_iters: int = 1000         # steps in all
    n_embd: int = 128             # numbers that describe a character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # blocks; 0 is the simplest language model, without attention
    dropout: float = 0.1          # share of activations turned off in training
    optimizer: str = "adamw"      # adamw or muon
    learning_rate: float = 3e-3   # the peak, after warm-up
    weight_decay: float = 0.02    # pull of the weight matrices towards 0
    warmup_iters: int = 100       # steps over which the learning rate climbs to its peak
    grad_clip: float = 1.0        # longest gradient allowed; 0 is no limit
    eval_interval: int = 250      # steps between two evaluations, each of which saves
    eval_iters: int = 20          # batches per evaluation and split
    seed: int = 1337              # same seed, corpus and settings: same model
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # of the matrix products: float32 or bfloat16
    compile: bool = False         # let torch.compile fuse the kernels

    def __post_init__(self):
        self.out = self.out or default_out(self.data)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                setattr(self, f.name, float(value))
            elif type(value) is not f.type:
                raise ValueError(f"{f.name} must be of type {f.type.__name__}, not {value!r}")
        for names, low, high in (("batch_size block_size grad_accum n_embd n_head eval_interval eval_iters", 1, 2**31),
                                 ("max_iters warmup_iters", 0, 2**31), ("n_layer", 0, 1000), ("seed", 0, 2**63),
                                 ("dropout", 0, 0.99), ("learning_rate weight_decay", 0, 10), ("grad_clip", 0, 1e9)):
            for name in names.split():
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")
        for name, choices in (("optimizer", ("adamw", "muon")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}: heads share it out evenly")

    @property
    def answers_prompts(self):
        """Whether the model learns from pairs: then chat shows it a line and waits for END."""
        return self.data.lower().endswith(".jsonl")


ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer")  # what the shapes of the weights depend on


def default_out(data):
    return (Path(data).resolve().stem if data else "model") + ".pkl"


def device_defaults(device):
    """What a device wants other than the values above, which are for a CPU: a GPU gets the course's larger model."""
    if not device.startswith("cuda"):
        return {}
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return dict(batch_size=64, block_size=256, max_iters=5000, n_embd=384, n_head=8, n_layer=8, dropout=0.2,
                learning_rate=1e-3, warmup_iters=200, eval_interval=500, dtype="bfloat16" if bfloat16 else "float32",
                compile=True)


# ---------------------------------------------------------------------------------------------------------- tokenizer

END = "\x03"    # ASCII's "end of text": closes every document, and every answer, so that the model learns to stop
UNK = "\ufffd"  # Unicode's replacement character: stands for whatever is not in the vocabulary


class CharTokenizer:
    """Characters to token ids and back (lesson: encoder and decoder are inverse maps).

    The vocabulary is the sorted set of characters. That keeps it small and the sequences long; words as tokens would do
    the reverse, and subwords (byte-pair encoding, as in GPT-2) are the compromise that large models make.

    chars: any iterable of characters; END and UNK are added.
    """

    def __init__(self, chars):
        self.chars = "".join(sorted({*chars, END, UNK}))
        self.vocab_size = len(self.chars)
        self.end, self.unk = self.chars.index(END), self.chars.index(UNK)
        self._codes = np.array([ord(c) for c in self.chars], dtype=np.uint32)                # id -> code point
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self._ids = np.full(sys.maxunicode + 1, self.unk, dtype=self.dtype)                 # code point -> id
        self._ids[self._codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text):
        return cls(set(text))

    def encode(self, text):
        """str -> ids, 1-D uint16 (uint32 past 65,536 entries). Unknown characters become UNK; it never fails."""
        chunks = (text[i : i + 2**20] for i in range(0, max(1, len(text)), 2**20))  # a piece at a time stays in cache
        return np.concatenate([self._ids[np.frombuffer(c.encode("utf-32-le", "surrogatepass"), "<u4")] for c in chunks])

    def decode(self, ids):
        """Ids (list or integer array) -> str."""
        return self._codes[np.asarray(ids, dtype=np.int64)].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


# --------------------------------------------------------------------------------------------------------------- data

def clean(text):
    """Windows line ends become \\n; what the vocabulary reserves and what is no character become UNK."""
    return re.sub(f"[{END}\ud800-\udfff]", UNK, text.replace("\r\n", "\n"))


def read_text(path):
    """A UTF-8 file as str, cleaned; a byte-order mark goes, and bytes that are not UTF-8 become UNK."""
    return clean(Path(path).read_bytes().decode("utf-8-sig", "replace"))


def read_pairs(path):
    """A .jsonl of {"prompt": ..., "completion": ...} lines -> one document a pair. ValueError names a bad line."""
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                pair = json.loads(line)
                documents.append(clean(pair["prompt"] + "\n" + pair["completion"]))
            except (ValueError, TypeError, KeyError):
                raise ValueError(f'{path}, line {number}: not {{"prompt": "...", "completion": "..."}}') from None
    return documents


def read_folder(folder):
    """What prepare_owt.py wrote -> memory-mapped splits and tokenizer. ValueError says what is missing or broken."""
    splits, vocabulary = {}, folder / "vocab.json"
    for path in (vocabulary, folder / "train.bin", folder / "val.bin"):
        if not path.is_file():
            raise ValueError(f"{folder}: {path.name} is missing; prepare_owt.py makes such a folder")
        if path.suffix == ".bin":
            if path.stat().st_size % 2 or not path.stat().st_size:
                raise ValueError(f"{path}: {path.stat().st_size} bytes are no row of 16-bit token ids")
            # The file stays on disk and looks like an array: the system reads the pages that are touched, no more.
            splits[path.stem] = np.memmap(path, dtype=np.uint16, mode="r")
    try:
        chars = json.loads(vocabulary.read_text("utf-8"))
        tokenizer = CharTokenizer(chars)
        if list(chars) != list(tokenizer.chars):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"{vocabulary}: not a sorted list of characters with END and UNK") from None
    return splits, tokenizer


def load_data(config, tokenizer=None):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer). ids: 1-D uint16, array or memmap.

    The first 90 % are for training and the rest for validation: an exam needs questions that the homework had not, or
    memorising would look like learning. A tokenizer given (fine-tuning, training on) is kept; otherwise the vocabulary is
    made from the text. Raises ValueError if the corpus is too small or broken, OSError if it cannot be read.
    """
    path = Path(config.data)
    if config.data and path.is_dir():
        splits, own = read_folder(path)
        if tokenizer and tokenizer.chars != own.chars:
            raise ValueError(f"{path}: its vocabulary is not the model's, and its ids cannot be changed")
        tokenizer = own
    else:
        if config.answers_prompts:
            documents = read_pairs(path)
            if len(documents) < 2:
                raise ValueError(f"{path}: {len(documents)} pairs; there must be two at least, one to train and one to test")
            cut = sum(len(d) + 1 for d in documents[: int(0.9 * len(documents))])
        else:
            if config.data:
                documents = [read_text(path)]
            else:
                from pydoc_data.topics import topics  # half a million characters that every CPython has
                documents = [clean(text) for text in topics.values()]
            cut = int(0.9 * len(END.join(documents)))
        text = END.join(documents) + END
        tokenizer = tokenizer or CharTokenizer.from_text(text)
        ids = tokenizer.encode(text)
        splits = {"train": ids[:cut], "val": ids[cut:]}
        if config.answers_prompts:  # a handful of pairs is a fair corpus: repeat it until a block fits
            splits = {k: np.tile(v, config.block_size // len(v) + 1) for k, v in splits.items()}
    for name, ids in splits.items():
        if len(ids) <= config.block_size:
            raise ValueError(f"{config.data or 'the documentation'}: the {name} split has {len(ids)} characters, "
                             f"which must be more than block_size {config.block_size}: lower --block_size or add text")
    return splits, tokenizer


def get_batch(data, config, starts=None, vocab_size=None):
    """Blocks of text and what follows each character: (x, y), both int64 (B, T) on config.device; y is x one later.

    A block of T characters holds T examples, one for each prefix: after "h" comes "e", after "he" comes "l". A batch is B
    such blocks, which a GPU works through at once. starts: where they begin, (B,) integers (random if None). ids are
    stored in 2 bytes and widened here: embeddings index with int64, and only the batch needs the room. On a memmap this
    touches B * (T + 1) ids of the file, however large it is. With vocab_size, ValueError if an id lies outside.
    """
    if starts is None:
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,)).numpy()
    blocks = data[starts[:, None] + np.arange(config.block_size + 1)]  # (B, T + 1)
    if vocab_size and blocks.max() >= vocab_size:
        raise ValueError(f"{config.data}: holds id {blocks.max()}, but its vocabulary ends at {vocab_size - 1}")
    x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in (blocks[:, :-1], blocks[:, 1:]))
    if config.device.startswith("cuda"):  # from pinned memory the copy runs while the GPU computes
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(config.device, non_blocking=True), y.to(config.device, non_blocking=True)


# -------------------------------------------------------------------------------------------------------------- model

class Cache:
    """Keys and values of the characters read so far, so that a new character costs one position and not T."""

    def __init__(self, config, batch_size, like):
        self.kv = like.new_empty(config.n_layer, 2, batch_size, config.n_head, config.block_size,
                                 config.n_embd // config.n_head)
        self.position = 0  # how many characters are in

    def extend(self, layer, kv):
        """Keeps the new characters' keys and values, (2, B, H, T, D); returns those of all characters up to now."""
        end = self.position + kv.shape[3]
        self.kv[layer, :, :, :, self.position : end] = kv
        return self.kv[layer, :, :, :, :end]


class Head(nn.Module):
    """Self-attention: how characters look at one another (Vaswani et al. 2017, "Attention Is All You Need").

    Each character asks a query ("what am I looking for?"), offers a key ("what do I contain?") and passes on a value.
    Query times key is a score; the scores, as shares that sum to 1, say how much of each value to take. A recurrent network
    would carry the past along step by step; here every position looks back at once, which is what GPUs are good at.

        scores = q @ k.transpose(-2, -1) / D ** 0.5             # scores grow with D; softmax would pick a single winner
        past = torch.ones(T, T, dtype=torch.bool).tril()        # lower triangle: position t sees 0 ... t
        scores = scores.masked_fill(~past, float("-inf"))       # ... and never the future, which it is to predict
        weights = scores.softmax(dim=-1)                        # e ** -inf is 0: no share for the future
        out = weights @ v                                       # a weighted sum of values

    F.scaled_dot_product_attention does just this, in one kernel that never stores the T x T scores and needs no mask in a
    register_buffer. It works on all heads at once. q, k, v: (B, H, T, D) -> (B, H, T, D).
    """

    def forward(self, q, k, v):
        # A single query is the newest character, which may see every key. No dropout on the shares, unlike the course:
        # it costs PyTorch's CPU kernel 40 % of the training rate and never paid for that at these sizes.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


class MultiHeadAttention(nn.Module):
    """Several heads, each in D channels of its own: they see the same text from different sides. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # queries, keys, values in one product
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)                 # lets the heads' findings mix
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        q, *kv = qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        k, v = cache.extend(layer, qkv[1:]) if cache else kv
        heads = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): heads side by side
        return self.dropout(self.proj(heads))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear: after looking around, each character thinks by itself. (B, T, C) -> (B, T, C).

    Without the ReLU between them two linear maps would be one. (Sigmoid and tanh bend the line too, but flatten out, and
    learn slowly there.) Dropout turns off random activations in training, so that none can lean on another.
    """

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU(inplace=True),
                         nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input and normalised (post-norm, as in the course).

    The residual carries the input past each sub-layer, so that gradients reach the first block undiminished; the norm
    keeps the sums at one scale. This is the Transformer's decoder alone: with no second text to translate from, there is
    no encoder and no cross-attention.
    """

    def __init__(self, config):
        super().__init__()
        self.attention, self.feedforward = MultiHeadAttention(config), FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)

    def forward(self, x, cache=None, layer=0):
        x = self.norm1(x + self.attention(x, cache, layer))
        return self.norm2(x + self.feedforward(x))


class GPT(nn.Module):
    """Token ids in, for each position a score for every possible next character out."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.tokens = nn.Embedding(vocab_size, config.n_embd)             # what the model knows of each character
        self.positions = nn.Embedding(config.block_size, config.n_embd)   # where it stands: attention alone sees a set
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # Sequential would not pass the cache
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # small: the first guess must be uniform
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, index, targets=None, cache=None):
        """index, targets: int64 (B, T), T <= block_size -> logits (B, T, V), and the loss (None without targets).

        The loss is the cross-entropy: the mean of -ln(probability given to the character that came). A uniform guess over
        80 characters costs ln 80 = 4.38. With a cache, index continues what the cache holds.
        """
        start, T = cache.position if cache else 0, index.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} characters do not fit the context: block_size is {self.config.block_size}")
        x = self.tokens(index) + self.positions(torch.arange(start, start + T, device=index.device))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache:
            cache.position += T
        logits = self.head(self.norm(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1, and yields one new character at a time, (B, 1).

        temperature below 1 sharpens the choice (0 always takes the likeliest), above 1 flattens it; top_k keeps the k
        likeliest. The model sees the last block_size characters. Once they fill the cache, the last half is read anew and
        the next characters have room again: the cost of a character stays the same however long the text.
        """
        if not (index.shape[1] and temperature >= 0 and (top_k is None or top_k >= 1)):
            raise ValueError("generation needs a first character, temperature >= 0 and top_k >= 1 or None")
        block_size = self.config.block_size
        cache = Cache(self.config, len(index), self.tokens.weight)
        unread = index = index[:, -block_size:]
        for _ in range(max_new_tokens):
            if cache.position + unread.shape[1] > block_size:
                cache.position, unread = 0, index[:, -max(1, block_size // 2) :]
            logits = self(unread, cache=cache)[0][:, -1].float()  # (B, V): only the last position's guess is new
            if top_k is not None:
                best = logits.topk(min(top_k, logits.shape[1]))
                logits = torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)
            unread = torch.multinomial(F.softmax(logits / max(temperature, 1e-6), dim=-1), 1)  # draw, do not just take
            index = torch.cat((index, unread), dim=1)[:, -block_size:]
            yield unread

    def generate(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """index (B, T) and its continuation, (B, T + max_new_tokens). See stream."""
        return torch.cat((index, *self.stream(index, max_new_tokens, temperature, top_k)), dim=1)


# ------------------------------------------------------------------------------------------------------ loss estimate

def autocast(config):
    """bfloat16 for the matrix products, float32 for what needs its digits (norm, softmax, loss); or nothing at all."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def estimate_loss(model, splits, config):
    """Mean loss over eval_iters batches of each split: {"train": float, "val": float}.

    The batches lie evenly over the split and are the same every time, so that two evaluations can be compared. eval() turns
    dropout off: the exam is taken with the whole brain. no_grad() saves the memory that only learning needs.
    """
    training, losses = model.training, {}
    model.eval()
    for name, data in splits.items():
        starts = np.linspace(0, len(data) - config.block_size - 1, config.eval_iters * config.batch_size).astype(np.int64)
        with autocast(config):
            batches = (get_batch(data, config, s, model.vocab_size) for s in starts.reshape(config.eval_iters, -1))
            losses[name] = torch.stack([model(x, y)[1] for x, y in batches]).mean().item()
    model.train(training)
    return losses


# -------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors. Whatever happens, path holds the old file or the new one, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there, before the old file goes
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise OSError(None, f"not saved, and as it was before: {error}", str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, on the CPU. Raises OSError if there is none, ValueError for anything else.

    weights_only=True unpickles tensors and plain values and nothing else: a stranger's checkpoint cannot run code. The
    shapes are compared with a model on the meta device, which has sizes but no memory, before a real one is built.
    """
    def check(state, model):
        expected = model.state_dict()
        if not (state.keys() == expected.keys() and all(
                v.shape == expected[k].shape and v.dtype == torch.float32 and v.is_contiguous() for k, v in state.items())):
            raise ValueError("its tensors do not fit its config")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
        config, tokenizer = Config(**saved["config"]), CharTokenizer(saved["chars"])
        with torch.device("meta"):
            model = GPT(config, tokenizer.vocab_size)
        check(saved["model"], model)
        check(saved["best"]["model"], model)
        for optimizer, state in zip(make_optimizers(model, config), saved["optimizer"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in state.items():
                if any(v.shape not in ((), params[i].shape) for v in values.values()):
                    raise ValueError("its optimizer state does not fit its config")
        if not (type(saved["step"]) is int and saved["corpus"] and all(len(row) == 3 for row in saved["losses"])):
            raise ValueError("its record of the run is damaged")
        return saved
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: no checkpoint of gpt.py: {type(error).__name__}: {error}"[:200]) from error


def chosen_weights(saved):
    """The best weights by validation loss; of a model trained on pairs the latest, for held-out pairs are new facts,
    whose loss rises while the model learns."""
    return saved["model"] if Config(**saved["config"]).answers_prompts else saved["best"]["model"]


def load_model(path, device="cpu"):
    """A checkpoint -> (model in eval mode on the device, tokenizer, config). Raises as load_checkpoint does."""
    saved = load_checkpoint(path)
    config, tokenizer = Config(**{**saved["config"], "device": device}), CharTokenizer(saved["chars"])
    model = GPT(config, tokenizer.vocab_size)
    model.load_state_dict(chosen_weights(saved))
    return model.to(device).eval(), tokenizer, config


def fingerprint(splits, tokenizer):
    """Tells corpora apart: vocabulary, sizes, and the ids themselves (of a large corpus, both ends of each split)."""
    digest = hashlib.sha256(tokenizer.chars.encode())
    for ids in splits.values():
        digest.update(b"%d" % len(ids) + ids[: 2**22].tobytes() + ids[-(2**22) :].tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- training

def learning_rate(step, config):
    """The step size of gradient descent: too high overshoots, too low crawls. Linear warm-up, while AdamW's averages are
    still guesses; then a cosine down to a tenth, to settle."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_optimizers(model, config):
    """[AdamW] or [AdamW, Muon].

    Adam (Kingma and Ba 2014) is momentum, the mean of past gradients, over RMSprop, their mean size: each weight gets a step
    of its own. The W (Loshchilov and Hutter 2017) pulls matrices towards 0 apart from the gradient step. Muon (Jordan 2024)
    also makes the update of a matrix orthogonal, so that no direction in it drowns the others; it is for the blocks'
    matrices, and scaled here to serve with AdamW's learning rate.
    """
    muon, decay, plain = [], [], []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 else muon if config.optimizer == "muon" and name.startswith("blocks.") else decay).append(p)
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizers = [torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.99),
                                    fused=not model.head.weight.is_meta, **settings)]
    return optimizers + ([torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **settings)] if muon else [])


def mix(*numbers):
    """A seed from several numbers, such that (1, 2) and (2, 1) or (0, 3) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def rank_and_world():
    """Which process this is, and of how many (torchrun starts them)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def training_step(model, optimizers, data, config, step, lap=lambda part: None):
    """One step of gradient descent on grad_accum micro-batches; returns the mean loss, a tensor.

    Micro-batches are for a batch larger than memory holds: their gradients add up before the weights move. What is drawn
    depends on (seed, step, micro-batch) alone, not on what came before nor on how many processes share the micro-batches.
    lap(part) is called after each part, for timing.
    """
    rank, world = rank_and_world()
    vocab_size = getattr(model, "module", model).vocab_size  # DistributedDataParallel wraps the model
    starts = np.random.default_rng((config.seed, step)).integers(
        len(data) - config.block_size, size=(config.grad_accum, config.batch_size))
    mine, total = range(rank, config.grad_accum, world), 0.0
    for micro in mine:
        torch.manual_seed(mix(config.seed, step, micro))  # for dropout
        x, y = get_batch(data, config, starts[micro], vocab_size)
        lap("batch")
        if world > 1:
            model.require_backward_grad_sync = micro == mine[-1]  # gradients travel once a step
        with autocast(config):
            loss = model(x, y)[1] / len(mine)
        lap("forward")
        loss.backward()
        lap("backward")
        total += loss.detach()
    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    lap("update")
    return total


def compiled(model, data, config):
    """torch.compile(model) where config asks for it and it works, otherwise the model itself."""
    if not config.compile:
        return model
    fast = torch.compile(model)
    try:  # compilers fail late: when they first meet a batch
        with autocast(config):
            loss = fast(*get_batch(data, config))[1]
        loss.backward()
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f"not compiled: {type(error).__name__}: {str(error).strip()}".split("\n")[0][:150], file=sys.stderr)
        return model
    finally:
        model.zero_grad()


def refuse_changes(config, saved, path, names):
    """ValueError if one of the named settings is not what the checkpoint at path was trained with."""
    for name in names:
        if getattr(config, name) != saved["config"][name]:
            raise ValueError(f"{path} was trained with {name} {saved['config'][name]!r}, not {getattr(config, name)!r}; "
                             f"to train another model: {command(replace(config, out=free_name(config.out)))}")


def free_name(path):
    path = Path(path)
    return next(str(p) for n in itertools.count(2) if not (p := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())


def command(config, script="python gpt.py"):
    """The command line that gives this config."""
    usual, words = Config(**{**device_defaults(config.device), "data": config.data}), script.split()
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "data" and value or value != getattr(usual, f.name):
            words += [f"--{'' if value else 'no-'}{f.name}"] if f.type is bool else [f"--{f.name}", str(value)]
    return shlex.join(words)


@contextmanager
def stop_requests():
    """A list that fills when Ctrl-C or SIGTERM asks to stop; a second Ctrl-C raises KeyboardInterrupt as usual."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def printable(text):
    """Text as a terminal may see it: no control characters (they could move the cursor or worse) but line end and tab."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else UNK for c in text)


def sparkline(values):
    """A curve in one line: ▇▄▂▁▁"""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def train(config):
    """Trains, or carries on where config.out stopped; returns the model with its latest weights, in eval mode.

    A run is a function of config, corpus and seed, stopped and resumed however often. Under torchrun every process calls
    this; process 0 evaluates, prints and saves. Raises ValueError or OSError where the user must change something.
    """
    device = torch.device(config.device)
    resumed = load_checkpoint(config.out) if os.path.exists(config.out) else None
    source = resumed or (load_checkpoint(config.init_from) if config.init_from else None)
    if source:
        refuse_changes(config, source, config.out if resumed else config.init_from,
                       ARCHITECTURE + ("optimizer", "seed", "init_from") * bool(resumed))
    splits, tokenizer = load_data(config, CharTokenizer(source["chars"]) if source else None)
    run = {"config": asdict(config), "chars": tokenizer.chars, "corpus": fingerprint(splits, tokenizer),
           "step": 0, "losses": [], "best": {"loss": math.inf, "model": {}}}
    if resumed:
        if resumed["corpus"] != run["corpus"]:
            raise ValueError(f"{config.out} was trained on another corpus than {config.data or 'this documentation'}; "
                             f"to train another model: {command(replace(config, out=free_name(config.out)))}")
        run |= {k: resumed[k] for k in ("step", "losses", "best")}
    if not os.access(Path(config.out).resolve().parent, os.W_OK):  # better told now than after an hour
        raise ValueError(f"{config.out}: its folder does not exist or cannot be written")

    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, world = rank_and_world()
    if config.grad_accum % world:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by the {world} processes that share it")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: ten bits of fraction, several times the speed
        if world > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    torch.manual_seed(config.seed)
    model = GPT(config, tokenizer.vocab_size)
    if source:
        model.load_state_dict(resumed["model"] if resumed else chosen_weights(source))
    model.to(device)
    optimizers = make_optimizers(model, config)
    for optimizer, state in zip(optimizers, resumed["optimizer"] if resumed else ()):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    forward = compiled(model, splits["train"], config)
    shared = forward if world == 1 else nn.parallel.DistributedDataParallel(forward)

    def say(*words):
        if rank == 0:
            tqdm.write(" ".join(words))

    def save():
        if rank == 0:
            save_checkpoint(config.out, {**run, "model": model.state_dict(),
                                         "optimizer": [optimizer.state_dict()["state"] for optimizer in optimizers]})

    def evaluate():
        losses = estimate_loss(forward, splits, config)
        if not math.isfinite(losses["train"] + losses["val"]):
            raise ValueError(f"the loss is {losses['val']} at step {run['step']}: try a lower --learning_rate")
        run["losses"].append((run["step"], losses["train"], losses["val"]))
        if losses["val"] < run["best"]["loss"]:
            run["best"] = {"loss": losses["val"], "model": {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}}
        say(f"step {run['step']:6,d}   train {losses['train']:.4f}   val {losses['val']:.4f}")

    chars = config.batch_size * config.grad_accum * config.block_size
    say(f"device  {torch.cuda.get_device_name() if device.type == 'cuda' else device}, {config.dtype}, "
        f"{'compiled' if forward is not model else 'uncompiled'}, {world} process{'es' * (world > 1)}")
    say(f"corpus  {config.data or 'the Python documentation'}: {len(splits['train']):,} characters to train on, "
        f"{len(splits['val']):,} to validate, vocabulary {tokenizer.vocab_size:,}")
    say(f"model   {sum(p.numel() for p in model.parameters()):,} parameters, {config.out}"
        + f", resumed at step {run['step']:,}" * bool(resumed))
    bar = tqdm(total=config.max_iters, initial=run["step"], unit="char", unit_scale=chars, disable=None if rank == 0 else True)
    with stop_requests() as asked, bar:
        if run["step"] >= config.max_iters and run["losses"]:
            say(f"already at step {run['step']:,}: more with --max_iters above {config.max_iters}")
        while True:
            step = run["step"]
            if rank == 0 and (step % config.eval_interval == 0 or step >= config.max_iters) and (
                    not run["losses"] or run["losses"][-1][0] != step):
                evaluate()
                save()
            if step >= config.max_iters:
                break
            if any_process(asked):
                save()
                break
            loss = training_step(shared, optimizers, splits["train"], config, step)
            run["step"] += 1
            bar.update()
            if step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if rank == 0:
        report(run, model, tokenizer, config)
    if world > 1:
        dist.destroy_process_group()
    return model.eval()


def any_process(asked):
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if rank_and_world()[1] == 1:
        return bool(asked)
    flag = torch.tensor(len(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def report(run, model, tokenizer, config):
    """What a run came to: losses, their curve, memory, a sample, and how to go on."""
    (step, train_loss, val_loss), curve = run["losses"][-1], [row[2] for row in run["losses"]]
    print(f"losses  train {train_loss:.4f}, val {val_loss:.4f} at step {step:,}; best val {min(curve):.4f}   {sparkline(curve)}")
    if config.device.startswith("cuda"):
        print(f"memory  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU at the most")
    if run["step"] < config.max_iters:
        print(f"stopped at step {run['step']:,} of {config.max_iters:,}; the same command carries on")
        return
    start = torch.tensor([[tokenizer.end]], device=config.device)
    print(printable(tokenizer.decode(model.eval().generate(start, 500, 0.8)[0, 1:].tolist())))
    print(f"\nsaved   {config.out}; talk to it: python chat.py --model {shlex.quote(config.out)}")


def tune(config, fixed=()):
    """Tries micro-batch sizes, dtypes and compilation at an unchanged total batch; prints a table and the fastest command.

    Settings named in fixed stay as they are. Efficiency testing: time the parts, then change what takes longest.
    """
    splits, tokenizer = load_data(config)
    total, rows = config.batch_size * config.grad_accum, []
    print(f"{'batch_size':>10} {'grad_accum':>10} {'dtype':>9} {'compile':>8} {'chars/s':>10}   ms: batch forward backward update")
    for share, dtype, fuse in itertools.product((1, 2, 4), ("float32", "bfloat16"), (False, True)):
        if total % share or "dtype" in fixed and dtype != config.dtype or "compile" in fixed and fuse != config.compile:
            continue
        trial = replace(config, batch_size=total // share, grad_accum=share, dtype=dtype, compile=fuse)
        line = f"{total // share:10} {share:10} {dtype:>9} {str(fuse):>8} "
        torch.compiler.reset()
        torch.manual_seed(config.seed)
        try:
            model = GPT(trial, tokenizer.vocab_size).to(trial.device)
            optimizers = make_optimizers(model, trial)
            forward = compiled(model, splits["train"], trial)
            if fuse and forward is model:
                continue
            parts = {}

            def lap(part):
                if trial.device.startswith("cuda"):
                    torch.cuda.synchronize()
                now = time.perf_counter()
                parts[part] = parts.get(part, 0.0) + now - lap.last
                lap.last = now

            for step in range(8):
                if step == 3:  # the first steps warm up
                    parts.clear()
                lap.last = time.perf_counter()
                training_step(forward, optimizers, splits["train"], trial, step, lap)
            rate = 5 * total * config.block_size / sum(parts.values())
            rows.append((rate, trial))
            print(f"{line}{rate:10,.0f}       " + " ".join(f"{1000 * s / 5:8.1f}" for s in parts.values()))
        except torch.OutOfMemoryError:
            print(line + "out of memory")
    if rows:
        print("\nfastest: " + command(max(rows, key=lambda row: row[0])[1]))


# ------------------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """One line for a mistake, instead of the usage text."""

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))


def config_from(flags):
    """Settings in order of precedence: flags, then the checkpoint to carry on or to start from, then the device."""
    out = flags.get("out") or default_out(flags.get("data", ""))
    saved = {}
    if os.path.exists(out):
        saved = {k: v for k, v in load_checkpoint(out)["config"].items() if k not in ("device", "dtype", "compile", "out")}
    elif flags.get("init_from"):
        base = load_checkpoint(flags["init_from"])["config"]
        saved = {k: base[k] for k in ARCHITECTURE}
    return Config(**{**device_defaults(flags.get("device", Config.device)), **saved, **flags, "out": out})


def one_line(error):
    """What a user needs to read of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: halve --batch_size and double --grad_accum, or lower --block_size, --n_embd, --n_layer"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def run_command(work, name):
    """work() -> exit status; a user's mistake is one line on stderr and status 2."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a terminal without UTF-8 shows "?" and does not stop the run
            sys.stdout.reconfigure(errors="replace")
        return work() or 0
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv=None):
    """The command line: trains, or with --tune looks for the fastest settings. Returns the exit status."""
    def work():
        parser = Parser(prog="gpt.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                        argument_default=argparse.SUPPRESS)
        notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
        for f in fields(Config):
            kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
            parser.add_argument(f"--{f.name}", help=f"{notes[f.name]} ({f.default})", **kind)
        parser.add_argument("--tune", action="store_true", help="find the fastest settings for this machine")
        flags = vars(parser.parse_args(argv))
        if flags.pop("tune", False):
            tune(config_from(flags), flags)
        else:
            train(config_from(flags))
    return run_command(work, "gpt.py")


if __name__ == "__main__":
    sys.exit(main())
