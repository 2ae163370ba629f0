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
import argparse, hashlib, inspect, itertools, json, math, os, re, shlex, signal, sys, time, unicodedata, warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------- hyperparameters

DEVICES = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]  # of this machine


@dataclass
class Config:
    """Every setting of a run: chosen, while parameters are learned. ValueError if one makes no sense."""
    data: str = ""                # text file, .jsonl of pairs, or prepared folder; "" is Python's documentation
    out: str = ""                 # checkpoint to write and to carry on from; "" is named after the data
    init_from: str = ""           # checkpoint whose weights and vocabulary a new run starts from (fine-tuning)
    batch_size: int = 32          # texts worked on at once: B
    block_size: int = 128         # characters of context: T
    grad_accum: int = 1           # batches that make up one step, over all processes
    max_iters: int = 900          # steps in all
    n_embd: int = 128             # numbers that describe a character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # layers (each a Block); 0 is the simplest model, nearly a bigram: sees one character
    dropout: float = 0.1          # share of activations turned off in training
    optimizer: str = "adamw"      # adamw or muon
    learning_rate: float = 3e-3   # step size at its peak, after warm-up
    weight_decay: float = 0.02    # pull of the weight matrices towards 0
    warmup_iters: int = 100       # steps over which the learning rate climbs to its peak
    grad_clip: float = 1.0        # longest gradient allowed; 0 is no limit
    eval_interval: int = 150      # steps between two evaluations, each of which saves
    eval_iters: int = 10          # batches per evaluation and split
    seed: int = 1337              # same seed, corpus and settings: same model
    device: str = "cuda" if "cuda" in DEVICES else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # float32, or bfloat16: half the bits, faster matrix products
    compile: bool = False         # let torch.compile merge small operations into fast ones

    def __post_init__(self):
        choices = {"optimizer": ("adamw", "muon"), "dtype": ("float32", "bfloat16")}
        for field in fields(self):
            name = field.name
            value = field.type(getattr(self, name) or field.type())  # a Path to str, None to "", 0 or False
            setattr(self, name, value)
            low = 0 if field.type is float or name in ("n_layer", "max_iters", "warmup_iters", "seed") else 1
            high = {"dropout": 0.99, "n_layer": 1000}.get(name, 2**31)
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
            if value not in choices.get(name, (value,)):
                raise ValueError(f"{name} must be {' or '.join(choices[name])}, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be divisible by n_head {self.n_head}: the heads share it out")
        self.out = self.out or (Path(self.data).resolve().stem if self.data else "model") + ".pkl"
        self.answers_prompts = self.data.endswith(".jsonl")  # chat then takes a line and waits for the answer's end


ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer")  # weights fit only a model that has these in common


def device_defaults(device):
    """What a device wants other than the values above, which are for a CPU: a GPU gets the course's larger model."""
    if device != "cuda":
        return {}
    return dict(batch_size=64, block_size=256, max_iters=5000, n_embd=384, n_head=8, n_layer=8, dropout=0.2,
                learning_rate=1e-3, warmup_iters=200, eval_interval=500, eval_iters=20, compile=True,
                dtype="bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")


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
        self._codes = np.array([ord(c) for c in self.chars], dtype="<u4")                             # id -> code point
        self._ids = np.full(sys.maxunicode + 1, self.unk, "<u2" if self.vocab_size <= 2**16 else "<u4")  # and back
        self._ids[self._codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text):
        return cls(set(text))

    def encode(self, text):
        """str -> ids, 1-D uint16 (uint32 past 65,536 entries). Unknown characters become UNK; it never fails."""
        # UTF-32 is each character's ord(): an array looks up all of them at once, a dict one at a time.
        return self._ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]

    def decode(self, ids):
        """Ids (list or integer array) -> str."""
        return self._codes[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le", "surrogatepass")


# --------------------------------------------------------------------------------------------------------------- data

def clean(text):
    """\\r\\n becomes \\n; END (reserved for the ends of documents) and surrogates (half characters) become UNK."""
    return re.sub(f"[{END}\ud800-\udfff]", UNK, text.replace("\r\n", "\n"))


def read_text(path):
    """A UTF-8 file as str, cleaned; a byte-order mark goes, and bytes that are not UTF-8 become UNK.

    "" is the documentation of the Python language, half a million characters that every CPython has.
    """
    if not path:
        from pydoc_data.topics import topics
        return END.join(clean(text) for text in topics.values())
    return clean(Path(path).read_bytes().decode("utf-8-sig", "replace"))


def read_pairs(path):
    """A .jsonl of {"prompt": ..., "completion": ...} lines -> a document for each. ValueError names a bad line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            if line.strip():
                pair = json.loads(line)
                yield clean(pair["prompt"] + "\n" + pair["completion"]) + END
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'{path}, line {number}: not {{"prompt": "...", "completion": "..."}}') from None


def read_folder(folder):
    """What prepare_owt.py wrote -> memory-mapped splits and tokenizer. ValueError names what is missing or broken."""
    try:
        chars = json.loads(Path(folder, "vocab.json").read_text("utf-8"))
        tokenizer = CharTokenizer(chars)
        if chars != [*tokenizer.chars]:
            raise ValueError("vocab.json is no sorted list of characters with END and UNK")
        # The files stay on disk and look like arrays: only what is touched is read.
        return {name: np.memmap(Path(folder, f"{name}.bin"), "<u2", "r") for name in ("train", "val")}, tokenizer
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: not as prepare_owt.py writes it: {error}") from None


def load_data(config, tokenizer=None):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer). ids: 1-D uint16, array or memmap.

    The first 90 % are for training and the rest for validation: an exam needs questions that the homework had not, or
    memorising would look like learning. A folder has its own tokenizer; a text takes the given one (fine-tuning,
    training on) or makes one.
    ValueError if the corpus is too small or broken, OSError if it cannot be read.
    """
    if os.path.isdir(config.data):
        splits, tokenizer = read_folder(config.data)
    else:
        text = list(read_pairs(config.data)) if config.answers_prompts else read_text(config.data) + END
        cut = int(0.9 * len(text))  # characters; of pairs, whole documents
        parts = text[:cut], text[cut:]
        if config.answers_prompts:  # a handful is a fair corpus: it is repeated until a block fits
            parts = [part * (config.block_size // max(1, len(part)) + 1) for part in map("".join, parts)]
        tokenizer = tokenizer or CharTokenizer.from_text("".join(parts))
        splits = dict(zip(("train", "val"), map(tokenizer.encode, parts)))
    for name, ids in splits.items():
        if len(ids) <= config.block_size:
            raise ValueError(f"{config.data or 'the documentation'}: {len(ids)} characters in {name} are no more "
                             f"than block_size {config.block_size}: lower --block_size or add text")
    return splits, tokenizer


def get_batch(data, config, starts=None):
    """Blocks of text and what follows each character: (x, y), int64 (B, T) on config.device; y is x shifted by one.

    A block of T characters holds T examples, one for each prefix: after "h" comes "e", after "he" comes "l". A batch
    is B such blocks, stacked, which a GPU works through at once. starts: where they begin, (B,) integers; random if
    None. Only these B * (T + 1) ids are read of a memmap. int64 because embeddings index with it; in a matrix product
    with float32 it would be an error.
    """
    if starts is None:
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,)).numpy()
    rows = starts[:, None] + np.arange(config.block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1): a row for each block
    blocks = torch.from_numpy(data[rows].astype(np.int64))
    if config.device == "cuda":  # from pinned memory the copy runs while the GPU computes
        blocks = blocks.pin_memory()
    blocks = blocks.to(config.device, non_blocking=config.device == "cuda")
    return blocks[:, :-1], blocks[:, 1:]


# -------------------------------------------------------------------------------------------------------------- model

class Head(nn.Module):
    """Self-attention: how characters look at one another (Vaswani et al. 2017, "Attention Is All You Need").

    Each character asks a query ("what am I looking for?"), offers a key ("what do I contain?") and passes on a value.
    The dot product of query and key is a score; the scores, as shares that sum to 1, weigh the values. A recurrent
    network would carry the past along step by step; here all positions look back at once, which is what GPUs do well.

        scores = q @ k.transpose(-2, -1)                        # (T, D) @ (D, T): the inner sizes must agree
        scores = scores / D ** 0.5                              # scores grow with D: else softmax picks a single winner
        past = torch.ones(T, T, dtype=torch.bool).tril()        # lower triangle: position t sees 0 ... t
        scores = scores.masked_fill(~past, float("-inf"))       # ... and never the future, which it is to predict
        shares = scores.softmax(dim=-1)                         # e ** score over their sum; e ** -inf is 0
        out = shares @ v                                        # a weighted sum of values

    F.scaled_dot_product_attention does this for all heads at once and stores neither the T x T scores nor the mask,
    which the course keeps in a register_buffer (not learned, but moved with the model). q, k, v: (B, H, T, D) each.
    """

    def forward(self, q, k, v):
        # A single query is generation's newest character, which may see every key: no mask. The course's dropout on the
        # shares would cost a CPU 40 % of its training rate, and gained nothing here.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


class MultiHeadAttention(nn.Module):
    """Several heads, each in D channels of its own, see the same text from different sides. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # queries, keys and values at once: Wx
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)  # Wx + b, both learned: lets the heads' findings mix
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape  # print(x.shape) works here and in every forward
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # each (B, T, C) -> (B, H, T, D)
                   for part in self.qkv(x).chunk(3, dim=-1))
        if cache:
            k, v = cache.extend(layer, k, v)
        heads = self.head(q, k, v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C): heads side by side
        return self.dropout(self.proj(heads))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear, run in turn by Sequential: each character thinks by itself. (B, T, C) -> (B, T, C).

    Without the ReLU between them, which makes negatives 0, two linear maps would be one. (Sigmoid and tanh bend too,
    but flatten out and learn slowly there.) Dropout turns off random activations, so that none can lean on another.
    """

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU(inplace=True),
                         nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))

    def forward(self, x):
        # As a matrix, (B * T, C), in which ReLU in place is faster.
        return super().forward(x.flatten(0, -2)).view_as(x)


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input and normalised (post-norm, as in the course).

    The residual (x + ...) carries the input past each sub-layer and gives gradients a short way back; the norm (mean 0,
    variance 1) keeps the sums at one scale. This is the Transformer's decoder alone: with no second text to translate
    from, there is no encoder and no cross-attention.
    """

    def __init__(self, config):
        super().__init__()
        self.attention, self.feedforward = MultiHeadAttention(config), FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)

    def forward(self, x, cache=None, layer=0):
        x = self.norm1(x + self.attention(x, cache, layer))
        return self.norm2(x + self.feedforward(x))


class Cache:
    """The keys and values of the characters read so far (see Head), so that a new one costs 1 position and not T."""

    def __init__(self, config, batch_size, like):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.n_layer)]
        self.position = 0  # how many characters are in

    def extend(self, layer, k, v):
        """Keeps k and v (B, H, T, D) of the new characters; returns those of all characters up to now."""
        keys, values = self.layers[layer]
        start, count = self.position, k.shape[2]
        keys.narrow(2, start, count).copy_(k)  # narrow(2, ...) is [:, :, start : start + count], in less time
        values.narrow(2, start, count).copy_(v)
        return keys.narrow(2, 0, start + count), values.narrow(2, 0, start + count)


class GPT(nn.Module):
    """Token ids in; out, at each position, a score (a logit; softmax makes it a share) for each possible next one."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(vocab_size, config.n_embd)             # what the model knows of each character
        self.positions = nn.Embedding(config.block_size, config.n_embd)   # where it is: attention alone knows no order
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # holds them; forward runs them
        self.norm = nn.LayerNorm(config.n_embd)  # the only one if n_layer is 0
        self.head = nn.Linear(config.n_embd, vocab_size)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)  # N(0, 0.02): so small that the first guess is nearly uniform
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, index, targets=None, cache=None):
        """index, targets: int64 (B, T), T <= block_size -> logits (B, T, V), and the loss (None without targets).

        The loss is the cross-entropy, or negative log likelihood: the mean of -ln(share given to the character that
        came). A uniform guess over V characters costs ln V (ln 80 = 4.38). Mean squared error is for regression. With a
        cache, index goes on from what that holds: many characters if it is empty, else one at a time.
        """
        start, T = cache.position if cache else 0, index.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} characters do not fit the context: block_size is {self.config.block_size}")
        x = self.tokens(index) + self.positions.weight[start : start + T]  # (B, T, C) + (T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache:
            cache.position += T
        logits = self.head(self.norm(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1, and yields one new character at a time, (B, 1).

        temperature below 1 sharpens the choice (0 always takes the likeliest), above 1 flattens it; top_k keeps the k
        likeliest. The model sees the last block_size characters, or fewer: what is cached cannot change its position,
        so a full cache is emptied and its last half read anew. A character costs the same however long the text.
        """
        if not (index.shape[1] and temperature >= 0 and (top_k is None or top_k >= 1)):
            raise ValueError("generation needs a first character, temperature >= 0 and top_k >= 1 or None")
        block_size, cache = self.config.block_size, Cache(self.config, len(index), self.tokens.weight)
        index = unread = index[:, -block_size:]
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # no gradients; left before yield, or the caller would be in it too
                if cache.position + unread.shape[1] > block_size:
                    cache.position, unread = 0, index[:, -max(1, block_size // 2) :]
                logits = self(unread, cache=cache)[0][:, -1].float()  # (B, V): only the last position's guess is new
                if top_k is not None:
                    best = logits.topk(min(top_k, logits.shape[1]))
                    logits = torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)
                shares = F.softmax(logits / max(temperature, 1e-6), dim=-1)
                unread = torch.multinomial(shares, 1)  # draw, do not just take the likeliest
                index = torch.cat((index, unread), dim=1)[:, -block_size:]
            yield unread.clone()  # an ordinary tensor, since it is made outside

    def generate(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """index (B, T) and its continuation, (B, T + max_new_tokens). See stream."""
        return torch.cat((index, *self.stream(index, max_new_tokens, temperature, top_k)), dim=1)


# ------------------------------------------------------------------------------------------------------ loss estimate

def autocast(config):
    """With --dtype bfloat16: 16 bits for the matrix products, float32 where digits count (norm, softmax, loss)."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


def estimate_loss(model, splits, config):
    """Mean loss over eval_iters batches of each split: {"train": float, "val": float}.

    The batches lie evenly over the split and are the same every time, so that two evaluations can be compared. eval()
    turns dropout off: the exam is taken with the whole brain. no_grad() saves the memory that only learning needs.
    """
    training, losses = model.training, {}
    model.eval()
    with torch.no_grad(), autocast(config):
        for name, data in splits.items():
            last, count = len(data) - config.block_size - 1, config.eval_iters * config.batch_size
            starts = np.linspace(0, last, count, dtype=np.int64).reshape(config.eval_iters, config.batch_size)
            losses[name] = torch.stack([model(*get_batch(data, config, row))[1] for row in starts]).mean().item()
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
        raise OSError(f"{path}: not saved, and as it was before: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, on the CPU. OSError if there is no file, ValueError if it is another kind.

    weights_only=True unpickles tensors and plain values and nothing else: a stranger's checkpoint cannot run code.
    Its tensors are tried on the meta device, which has shapes but no memory, before a real model is built.
    """
    with open(path, "rb") as file, warnings.catch_warnings(record=True):  # hides them
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            config = Config(**saved["config"])
            with torch.device("meta"):
                model = GPT(config, CharTokenizer(saved["chars"]).vocab_size)
            if sum(p.nbytes for p in model.parameters()) > os.path.getsize(path):
                raise ValueError("the file is smaller than its model")
            restore(make_optimizers(model, config), saved["optimizer"])
            for weights in (saved["model"], saved["best"]):
                model.load_state_dict(weights)  # RuntimeError where names or shapes differ
            return saved | {"config": asdict(config), "corpus": str(saved["corpus"]),
                            "step": int(saved["step"]), "losses": dict(saved["losses"])}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split(". ")[0][:150]
            raise ValueError(f"{path}: no checkpoint of gpt.py, or damaged: {reason}") from error


def restore(optimizers, states):
    """Gives optimizers the states from a checkpoint. ValueError if those do not fit the weights."""
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        names = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
        for p, tensors in optimizer.state.items():
            implied = {name: () if name == "step" else p.shape for name in names}
            if {name: t.shape for name, t in tensors.items() if t.is_contiguous()} != implied:
                raise ValueError("the optimizer's state does not fit the weights")


def load_model(path, device="cpu"):
    """A checkpoint's best weights -> (model in eval mode on the device, tokenizer, config). See load_checkpoint."""
    saved = load_checkpoint(path)
    config, tokenizer = Config(**{**saved["config"], "device": device}), CharTokenizer(saved["chars"])
    model = GPT(config, tokenizer.vocab_size)
    model.load_state_dict(saved["best"])
    return model.to(find_device(device)).eval(), tokenizer, config


# ----------------------------------------------------------------------------------------------------------- training

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: process RANK of WORLD


def find_device(name):
    """name, ready for use, or ValueError if this machine has no such device.

    A GPU does the many sums of a matrix product side by side. Tensors that meet in one must be on the same device.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be {' or '.join(DEVICES)} on this machine, not {name!r}")
    if name == "cuda":
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            raise ValueError(f"{torch.cuda.device_count()} GPUs are too few for --nproc_per_node {local + 1}")
        torch.cuda.set_device(local)  # under torchrun each process has a GPU of its own
        torch.set_float32_matmul_precision("high")  # TF32: fewer digits, far faster
    return name


def learning_rate(step, config):
    """How far gradient descent steps: too high overshoots, too low crawls. Linear warm-up, while AdamW's averages are
    still guesses; then a cosine down to a tenth, to settle."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_optimizers(model, config):
    """[AdamW] or [AdamW, Muon].

    Adam (Kingma and Ba 2014) steps by the mean of past gradients (momentum) over their root mean square (RMSprop): each
    weight has a step size of its own. The W (Loshchilov and Hutter 2017) pulls matrices towards 0 apart from that. Muon
    (Jordan 2024) makes all directions of a matrix's update equally long (orthogonal), so that none drowns the others;
    it is for the blocks' matrices, and scaled here so that AdamW's learning rate suits it.
    """
    muon, decay, plain = [], [], []  # plain: biases and norms, which nothing pulls towards 0
    for name, p in model.named_parameters():
        for_muon = config.optimizer == "muon" and name.startswith("blocks.")
        (plain if p.ndim < 2 else muon if for_muon else decay).append(p)
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizers = [torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.99),
                                    fused=not model.head.weight.is_meta, **settings)]
    return optimizers + ([torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **settings)] if muon else [])


def build(config, vocab_size, data):
    """(a new model on its device, its optimizers, the model as training calls it: compiled if config asks for that)."""
    torch.manual_seed(config.seed)
    model = fast = GPT(config, vocab_size).to(find_device(config.device))
    if config.compile:
        try:  # compilers fail late, when they first meet a batch
            fast = torch.compile(model)
            training_step(fast, [], data, config, step=0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            fast = model
            if RANK == 0:
                print(f"not compiled: {type(error).__name__}: {error}".split("\n")[0][:150], file=sys.stderr)
        model.zero_grad()
    return model, make_optimizers(model, config), fast


def training_step(model, optimizers, data, config, step, lap=lambda part: None):
    """One step of gradient descent on grad_accum micro-batches; returns this process's mean loss, a tensor.

    Micro-batches are for a batch larger than memory holds: their gradients add up before the weights move. All random
    numbers follow from (seed, step, micro-batch), so that resumed runs and several processes draw the same ones.
    lap(part) is called after each part, for timing.
    """
    mine, total = range(RANK, config.grad_accum, WORLD), 0.0
    starts = np.random.default_rng((config.seed, step)).integers(
        len(data) - config.block_size, size=(config.grad_accum, config.batch_size))
    for micro in mine:
        torch.manual_seed(int(np.random.SeedSequence((config.seed, step, micro)).generate_state(1, np.uint64)[0]))
        x, y = get_batch(data, config, starts[micro])
        lap("batch")
        if WORLD > 1:
            model.require_backward_grad_sync = micro == mine[-1]  # processes share gradients once a step, at its end
        with autocast(config):
            loss = model(x, y)[1] / len(mine)  # so that their sum is the mean
        lap("forward")
        loss.backward()  # adds to each weight's gradient, the direction in which the loss grows
        lap("backward")
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)  # one odd batch must not throw it far
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()       # the other way, by the learning rate
        optimizer.zero_grad()  # since backward only adds
    lap("update")
    return total


@contextmanager
def stop_requests():
    """A list that fills when Ctrl-C or SIGTERM asks to stop. The same one asking twice is a KeyboardInterrupt."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt

    with ExitStack() as undo:  # puts the old handlers back
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # only a main thread gets signals
                undo.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


def command(config):
    """The command line that makes this config."""
    usual, words = Config(**device_defaults(config.device), data=config.data), ["python", "gpt.py"]
    for name, value in asdict(config).items():
        if value != getattr(usual, name) or value and name in ("data", "batch_size", "grad_accum"):
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def open_run(config):
    """(run, splits, tokenizer). run is the dict that save_checkpoint writes: the one in config.out, or a new one, with
    the weights of config.init_from if one is named. ValueError if checkpoint, corpus and config do not match."""
    if not os.access(Path(config.out).resolve().parent, os.W_OK):  # better now than at the first save
        raise ValueError(f"{config.out}: no folder to write to")
    resuming = os.path.exists(config.out)
    path = config.out if resuming else config.init_from
    saved = load_checkpoint(path) if path else None
    splits, tokenizer = load_data(config, CharTokenizer(saved["chars"]) if saved else None)
    if saved and not resuming and tokenizer.chars != saved["chars"]:
        raise ValueError(f"{config.data}: its vocabulary is not the model's")
    sample = np.concatenate([ids[: 2**23] for ids in splits.values()])  # all of it may be 40 GB
    if (largest := sample.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{config.data}: holds id {largest}, and its vocabulary ends at {tokenizer.vocab_size - 1}")
    if RANK == 0:
        unknown = np.mean(sample == tokenizer.unk)
        print(f"corpus  {config.data or 'the Python documentation'}: {len(splits['train']):,} characters to train on, "
              f"{len(splits['val']):,} to validate{f', {100 * unknown:.3g} % of them unknown' * bool(unknown)}, "
              f"vocabulary {tokenizer.vocab_size:,}")
    digest = hashlib.sha256(repr([tokenizer.chars, *map(len, splits.values())]).encode() + sample.tobytes())
    run = {"config": asdict(config), "chars": tokenizer.chars, "corpus": digest.hexdigest()[:16], "step": 0,
           "losses": {}, "best": {}, "model": {}, "optimizer": []}
    if saved:
        mine, theirs = ({**each["config"], "corpus": each["corpus"]} for each in (run, saved))
        for name in ARCHITECTURE + (("optimizer", "seed", "init_from", "corpus") if resuming else ()):
            if mine[name] != theirs[name]:
                names = (f"{config.out.removesuffix('.pkl')}-{n}.pkl" for n in itertools.count(2))
                free = next(each for each in names if not os.path.exists(each))
                mend = f"for another model: {command(replace(config, out=free))}" if resuming else "leave that flag out"
                raise ValueError(f"{path} was trained with {name} {theirs[name]}, not {mine[name]}; {mend}")
        run = {**saved, "config": run["config"]} if resuming else {**run, "model": saved["best"]}
    return run, splits, tokenizer


def train(config):
    """Trains, or carries on where config.out stopped; returns the model with its latest weights, in eval mode.

    A run is a function of config and corpus, stopped and resumed however often. Under torchrun every process
    calls this; process 0 evaluates, prints and saves. ValueError or OSError where the user must change something.
    """
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by the {WORLD} processes that share it")
    run, splits, tokenizer = open_run(config)
    model, optimizers, fast = build(config, tokenizer.vocab_size, splits["train"])
    if run["model"]:
        model.load_state_dict(run["model"])
    if run["optimizer"]:
        restore(optimizers, run["optimizer"])
    say = tqdm.write if RANK == 0 else lambda line: None  # print would break the bar
    device = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    say(f"device  {device}, {config.dtype}{', compiled' * (fast is not model)}{f', {WORLD} processes' * (WORLD > 1)}")
    say(f"model   {sum(p.numel() for p in model.parameters()):,} parameters, {config.out}, "
        f"{'already ' * (run['step'] >= config.max_iters)}at step {run['step']:,} of {config.max_iters:,}")
    if WORLD > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo")
        latest = torch.tensor(run["step"])
        torch.distributed.all_reduce(latest, torch.distributed.ReduceOp.MAX)
        if latest > run["step"]:  # on several machines
            raise ValueError(f"{config.out}: is at step {latest} for another process; all must read the same file")
        fast = nn.parallel.DistributedDataParallel(fast)  # gradients become their mean over all
    # One turn more than steps: the last only evaluates and saves.
    bar = tqdm(range(run["step"], config.max_iters + 1), total=config.max_iters, initial=run["step"], unit="char",
               unit_scale=config.batch_size * config.grad_accum * config.block_size, disable=RANK > 0 or None)
    with stop_requests() as asked, bar:
        for step in bar:
            stop = torch.tensor(len(asked) + (step == config.max_iters))
            if WORLD > 1:  # all leave the loop at the same step
                vote = torch.distributed.all_reduce(stop, async_op=True)  # in a variable, or it may hang
                vote.wait()
            due = (step % config.eval_interval == 0 or step == config.max_iters) and step not in run["losses"]
            if (due or stop and step > run["step"]) and RANK == 0:
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise ValueError(f"the weights are no numbers any more at step {step}: lower --learning_rate")
                if due:
                    run["losses"][step] = losses = estimate_loss(model, splits, config)
                    say(f"step {step:6,d}   train {losses['train']:.4f}   val {losses['val']:.4f}")
                run |= {"step": step, "model": model.state_dict(),
                        "optimizer": [optimizer.state_dict()["state"] for optimizer in optimizers]}
                # For pairs the latest weights are best: a held-out pair asks for a fact never told, so its loss rises
                # while the model learns.
                if config.answers_prompts or due and losses["val"] <= min(row["val"] for row in run["losses"].values()):
                    run["best"] = {name: tensor.to("cpu", copy=True) for name, tensor in run["model"].items()}
                save_checkpoint(config.out, run)
            if stop:
                break
            loss = training_step(fast, optimizers, splits["train"], config, step)
            if step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if RANK == 0:
        report(run, model, tokenizer, config)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    return model.eval()


def printable(text):
    """Text as a terminal may see it: control characters, which could move the cursor or worse, become UNK, except those
    that words of many languages need (soft hyphen, joiner, non-joiner)."""
    return "".join(c if c in "\n\t\u00ad\u200c\u200d" or unicodedata.category(c)[0] != "C" else UNK for c in text)


def report(run, model, tokenizer, config):
    """What a run came to: losses, their curve, memory, a sample, and how to go on."""
    curve = [losses["val"] for losses in run["losses"].values()]
    low, high = min(curve), max(curve)
    spark = "".join("▁▂▃▄▅▆▇█"[round(7 * (loss - low) / (high - low or 1))] for loss in curve)
    step, losses = list(run["losses"].items())[-1]
    print(f"losses  train {losses['train']:.4f}, val {losses['val']:.4f} at step {step:,}; best {low:.4f}   {spark}")
    if config.device == "cuda":
        print(f"memory  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU at the most")
    if run["step"] < config.max_iters:
        print(f"stopped at step {run['step']:,} of {config.max_iters:,}; the same command carries on")
    else:
        index = torch.tensor([[tokenizer.end]], device=config.device)
        print(printable(tokenizer.decode(model.eval().generate(index, 500, 0.8)[0, 1:].tolist())))
        print(f"\nsaved   {config.out}; talk to it: python chat.py --model {shlex.quote(config.out)}")


def tune(config):
    """Times micro-batch sizes, dtypes and compilation at an unchanged total batch; prints a table and the best command.

    Efficiency testing: time the parts, then change what takes longest.
    """
    if WORLD > 1:
        raise ValueError("--tune is for one process")
    splits, tokenizer = load_data(config)
    total, steps, rates = config.batch_size * config.grad_accum, 5, {}
    accums = [n for n in (1, 2, 4) if total % n == 0]
    print("batch_size grad_accum     dtype compile     chars/s   ms:   batch  forward backward   update")
    for accum, dtype, compiled in itertools.product(accums, ("float32", "bfloat16"), (False, True)):
        trial = replace(config, batch_size=total // accum, grad_accum=accum, dtype=dtype, compile=compiled)
        marks, spent = [], {}

        def lap(part):
            getattr(torch, trial.device).synchronize()  # a GPU works on while Python goes ahead
            marks.append((part, time.perf_counter()))

        try:
            torch.compiler.reset()
            model, optimizers, fast = build(trial, tokenizer.vocab_size, splits["train"])
            if compiled and fast is model:
                continue
            for step in range(3 + steps):
                training_step(fast, optimizers, splits["train"], trial, step, lap)
                marks = marks[-1:] if step < 3 else marks  # the first three warm up
            for (_, before), (part, now) in itertools.pairwise(marks):
                spent[part] = spent.get(part, 0) + now - before
            rate = steps * total * config.block_size / sum(spent.values())
            rates[rate] = trial
            result = f"{rate:11,.0f}      " + "".join(f"{1000 * seconds / steps:9.1f}" for seconds in spent.values())
        except (RuntimeError, MemoryError) as error:  # too little memory, most likely
            result = str(error).split("\n")[0][:80]
        print(f"{trial.batch_size:10} {accum:10} {dtype:>9} {str(compiled):>7} {result}")
    if rates:
        print(f"\nfastest: {command(rates[max(rates)])}")


# ------------------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """Command-line flags of which a mistake is one line on stderr, without usage text, and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(' '.join(str(message).split()))}\n")


def main(argv=None):
    """The command line: trains, or with --tune looks for the fastest settings."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        parser.add_argument(f"--{field.name}", help=f"{comments[field.name]} ({field.default})", **kind)
    parser.add_argument("--tune", action="store_true", default=False, help="find the fastest settings for this machine")
    flags = vars(parser.parse_args(argv))
    tuning = flags.pop("tune")
    try:
        out = Config(**{name: flags[name] for name in ("data", "out") if name in flags}).out
        path = out if os.path.exists(out) else flags.get("init_from")
        saved = load_checkpoint(path)["config"] if path else {}
        kept = saved.keys() - {"device", "dtype", "compile", "out"} if path == out else ARCHITECTURE
        # Flags beat what is kept of the checkpoint, and that beats the device's defaults.
        config = Config(**device_defaults(flags.get("device", Config.device))
                        | {name: value for name, value in saved.items() if name in kept} | flags | {"out": out})
        tune(config) if tuning else train(config)
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|enough memory|allocate memory|ALLOC_FAILED|MemoryError", repr(error)):
            raise
        parser.error(f"out of memory on {config.device}: try --batch_size {max(1, config.batch_size // 2)} "
                     f"--grad_accum {2 * config.grad_accum}, then a smaller block_size, n_embd or n_layer")
    except IndexError as error:
        if "out of range in self" not in str(error):  # what an embedding says; open_run looks at a corpus's beginning
            raise
        parser.error(f"{config.data}: holds ids beyond its vocabulary")
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    # A terminal without UTF-8 shows "?" and does not stop the run; a log file grows line by line.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main()
