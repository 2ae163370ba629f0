"""A character-level GPT in one file: it reads text character by character and learns to write more.

    python gpt.py                    train on the documentation that Python carries
    python gpt.py --data book.txt    train on any UTF-8 text; the same command again carries on
    python gpt.py --help             every hyperparameter is a flag of the same name
    python chat.py                   talk to the model

It follows the freeCodeCamp course "Create a Large Language Model from Scratch with Python".
Part one is the lesson: what a GPT is and how it learns. Part two is the craft that keeps a run safe
and makes it fast; skip it on a first reading. Letters in comments are sizes:
    B  batch: texts worked on side by side      H  attention heads
    T  time: characters in each text            D  head size, C / H
    C  channels: numbers for each character     V  vocabulary: different characters
"""
import argparse, inspect, itertools, json, math, os, re, shlex, signal, sys, threading, time, zlib
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


# ================================ Part one: the lesson ==========================================

@dataclass
class Config:
    """The settings of a run. People choose these; parameters are what the model learns instead."""
    data: str = ""                # text, .jsonl of pairs or prepared folder; "" is Python's docs
    out: str = ""                 # checkpoint, the file of a model; "" is named after the data
    init_from: str = ""           # checkpoint whose weights a new run starts from (fine-tuning)
    batch_size: int = 32          # texts worked on at once: B
    block_size: int = 128         # characters that the model sees at most: T
    grad_accum: int = 1           # batches that make up one training step
    max_iters: int = 900          # training steps in all
    n_embd: int = 128             # numbers that describe each character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # layers (class Block) on top of each other; 0: no attention
    dropout: float = 0.1          # share of the numbers between layers turned off in training
    optimizer: str = "adamw"      # adamw or muon, which move the weights (see make_optimizers)
    learning_rate: float = 3e-3   # size of a training step at its largest
    weight_decay: float = 0.02    # how strongly weights are pulled to 0, against learning by heart
    warmup_iters: int = 100       # steps over which the learning rate climbs to its largest
    grad_clip: float = 1.0        # gradients longer than this, all as one vector, are shortened
    eval_interval: int = 150      # steps between two evaluations, each of which saves
    eval_iters: int = 10          # batches that an evaluation reads of each split
    seed: int = 1337              # where the random numbers start
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # float32, or bfloat16: half the bits, faster on some machines
    compile: bool = False         # let torch.compile turn the model into faster code

    def __post_init__(self):
        check(self)  # in part two: ValueError names a setting that makes no sense


# -------------------------------- tokenizer and data --------------------------------------------

END = "\x03"    # ASCII's "end of text" closes each document and answer: so the model learns to stop
UNK = "\ufffd"  # Unicode's replacement character stands for whatever is not in the vocabulary


class CharTokenizer:
    """Turns characters into token ids and back (lesson: encoder and decoder are inverse maps).

    The vocabulary is the sorted set of characters: small, and texts get long. Words as tokens do
    the reverse, and subwords (as in GPT-2) are the compromise. The course has two dictionaries:
        char_to_id = {char: id for id, char in enumerate(chars)}
        id_to_char = {id: char for id, char in enumerate(chars)}
    Here the string chars serves as the second, and as the first an array that looks up a whole text
    at once. A character's place in it is its code, the number that Unicode gives it (ord); UTF-32
    writes a text as these codes, four bytes each, and surrogatepass lets even odd ones through.
    chars: any iterable of characters; END and UNK are added."""

    def __init__(self, chars):
        self.chars = "".join(sorted(set(chars) | {END, UNK}))
        self.vocab_size = len(self.chars)
        self.end = self.chars.index(END)
        self.unk = self.chars.index(UNK)
        # Every code of Unicode first gets UNK's id, then those of the vocabulary get their own.
        self.code_to_id = np.full(sys.maxunicode + 1, self.unk, np.uint16)
        self.code_to_id[[ord(char) for char in self.chars]] = np.arange(self.vocab_size)

    def encode(self, text):
        """str -> ids, 1-D uint16. Characters outside the vocabulary become UNK; it never fails."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")  # "hi": 104, 105
        return self.code_to_id[codes]

    def decode(self, ids):
        """Ids, a list or an integer array -> str."""
        return "".join(self.chars[id] for id in ids)


def clean(text):
    """Windows' line ends become plain ones. END is ours, so one inside a text becomes UNK."""
    return text.replace("\r\n", "\n").replace(END, UNK)


def read_text(path):
    """A UTF-8 file -> str; bytes that are not UTF-8 become UNK, and a byte-order mark is removed.
    Without a path: the documentation that every CPython carries, half a million characters."""
    if path:
        return clean(Path(path).read_bytes().decode("utf-8-sig", "replace"))
    from pydoc_data.topics import topics
    return END.join(clean(text) for text in topics.values())


def read_pairs(path):
    """A .jsonl of {"prompt": ..., "completion": ...} lines -> str, a document for each line.
    ValueError names a line that is something else."""
    documents = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            pair = json.loads(line)
            documents.append(clean(pair["prompt"] + "\n" + pair["completion"]) + END)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: no object with prompt and completion texts")
    return "".join(documents)


def load_data(config, chars=""):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer).

    The first 90 % are for training, the rest for validation: an exam needs questions that the
    homework did not have, or learning by heart would look like learning. A folder is what
    prepare_owt.py made of a corpus larger than memory: np.memmap looks like an array, but reads
    from its file only what is used (in pages of 4 KiB).
    chars: the vocabulary of the model that the run starts from, if any. ids: 1-D uint16, an array
    or a memmap. ValueError if the corpus is too short or damaged, OSError if it cannot be read."""
    if os.path.isdir(config.data):
        tokenizer = CharTokenizer(json.loads(Path(config.data, "vocab.json").read_text("utf-8")))
        train = np.memmap(Path(config.data, "train.bin"), "<u2", "r")  # 2-byte integers, read only
        val = np.memmap(Path(config.data, "val.bin"), "<u2", "r")
    else:
        pairs = config.data.endswith(".jsonl")
        text = read_pairs(config.data) if pairs else (read_text(config.data) + END)
        cut = int(0.9 * len(text))
        if pairs:
            cut = text.rfind(END, 0, cut) + 1  # back to where a pair ends
        tokenizer = CharTokenizer(chars or text)
        train, val = np.split(tokenizer.encode(text), [cut])
        if pairs:  # a few are repeated until a block fits: of 50 ids, 3 copies make more than 128
            train = np.tile(train, 1 + config.block_size // max(1, len(train)))
            val = np.tile(val, 1 + config.block_size // max(1, len(val)))
    if min(len(train), len(val)) <= config.block_size:
        raise ValueError(f"{config.data}: splits of {len(train)} and {len(val)} characters must be "
                         f"longer than block_size {config.block_size}: lower it or add text")
    return {"train": train, "val": val}, tokenizer


def get_batch(data, config, starts=None):
    """Blocks of text, and what follows each character in them: (x, y), int64 (B, T).

    A block of T characters holds T examples, one for each beginning: after "h" comes "e", after
    "he" comes "l". A batch is B blocks, stacked. Both are tensors: arrays of numbers with a shape,
    a type (dtype) and a device that holds them. Ids are int64, since embeddings are indexed with
    integers. Types must agree: "expected Long but found Float" means float32 where ids should be.
    data: ids, 1-D. starts: where the blocks begin, (B,) integers; random if None. With T = 2,
    starts [5, 9] read the places [5, 6, 7] and [9, 10, 11]."""
    if starts is None:
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,)).numpy()
    places = starts[:, None] + np.arange(config.block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    blocks = torch.from_numpy(data[places].astype(np.int64))  # an id for each place: (B, T + 1)
    if config.device == "cuda":  # from pinned memory a GPU copies while Python goes on
        blocks = blocks.pin_memory()
    blocks = blocks.to(config.device, non_blocking=config.device == "cuda")
    return blocks[:, :-1], blocks[:, 1:]


# -------------------------------- model ---------------------------------------------------------

class Head(nn.Module):
    """Self-attention: how a character looks at those before it (Vaswani et al. 2017).

    A character is described by C numbers, x. Three learned mixes of them (sums, with weights) are
    its query ("what am I looking for?"), its key ("what do I contain?") and its value ("what do I
    pass on?"). A query times a key is a score for how well the two fit. The scores become shares,
    and each character takes that mixture of the values. A recurrent network carries the past along
    step by step; here all positions look back at once, which is what GPUs are good at.
    q, k, v: (B, H, T, D), made by MultiHeadAttention below: the C numbers of each are cut into H
    pieces of D, one for each head, and one call does them all. The course has a module for each
    head, with Linear layers of its own: the same numbers, more slowly."""

    def written_out(self, q, k, v):
        """What forward computes, step by step, for reading and for trying out with print."""
        T, D = q.shape[-2:]
        # In a matrix product each number is a row times a column, summed; the inner sizes must
        # agree: (T, D) @ (D, T) -> (T, T), a score for each pair of positions. It is done for each
        # of the B texts and H heads.
        scores = q @ k.transpose(-2, -1)                          # (B, H, T, T)
        # A sum of D products grows like sqrt(D), since plus and minus partly cancel (100 tosses for
        # +1 or -1 give some 10, not 100). With large scores softmax would pick one winner, and the
        # others' shares and gradients would be near 0.
        scores = scores / math.sqrt(D)
        # Position t sees positions 0 to t, the lower triangle: the rest is the future, which the
        # model is to predict. (The course keeps this constant mask in a register_buffer.)
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
        # Softmax: e ** score over the sum of the row. These are shares of 1; e ** -inf is 0.
        shares = scores.softmax(dim=-1)                           # (B, H, T, T)
        return shares @ v                                         # (B, H, T, D)

    def forward(self, q, k, v):
        # The same in one call, which never stores the T x T scores; is_causal is the mask. (With
        # the Cache below, only the newest character asks. A single query needs no mask: it may see
        # all keys.) The course has dropout on the shares too: it gained nothing, and costs time.
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


class Cache(dict):
    """What generation keeps: {attention module of a layer: (keys, values)} of the characters read.
    Nobody looks ahead, in any layer, so a later character cannot change the key and value of an
    earlier one. They are computed once: a new character costs 1 position's work, not T's."""
    length = 0  # how many characters have been read


class MultiHeadAttention(nn.Module):
    """Several heads read the same text at the same time, like several readers of one book, each
    with questions of its own. Their findings are joined and mixed. (B, T, C) -> (B, T, C).

    An nn.Linear is Wx + b: a matrix product with learned weights W, and a learned bias b. An
    nn.Module finds the parameters inside it, so that the optimizer can be handed all of them,
    .to(device) moves all of them and state_dict() saves all of them."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be divisible by n_head {config.n_head}")
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k, v of all heads
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.qkv(x).split(C, dim=2)        # (B, T, C) each
        # C is cut into H pieces of D; then T and H change places, so that each head has its text.
        q = q.view(B, T, H, D).transpose(1, 2)       # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)
        v = v.view(B, T, H, D).transpose(1, 2)
        if cache is not None:                        # in generation only
            if self in cache:                        # this layer's: old ones first, then new
                k = torch.cat((cache[self][0], k), dim=2)
                v = torch.cat((cache[self][1], v), dim=2)
            cache[self] = (k, v)
        x = self.head(q, k, v)                       # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)       # heads side by side again
        return self.dropout(self.proj(x))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear, run in turn by Sequential: each character thinks about what it has
    seen. (B, T, C) -> (B, T, C), with 4 C in between, as is custom.

    ReLU makes negative numbers 0; without it, two linear maps would be one, since A(Bx) = (AB)x.
    (Sigmoid and tanh bend too, but are flat for large inputs, where gradients are near 0.) Dropout
    turns off random activations, the numbers between layers, so that none can rely on another. It
    does so in training only."""

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU(),
                         nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))


class Block(nn.Module):
    """Attention, then feed-forward: one layer of the model. (B, T, C) -> (B, T, C).

    Each result is added to its input. This residual keeps what was known, and gives learning a
    short way back to the first layers, since gradients pass a sum unchanged. The norm gives each
    character's C numbers mean 0 and variance 1, so that sums keep one scale. Here it follows the
    sum: post-norm, as in the course. GPT-2 took pre-norm, x + sublayer(norm(x)).
    The first Transformer translated: an encoder read one language, and a decoder wrote the other,
    with cross-attention from the new text to the old. This is the decoder alone."""

    def __init__(self, config):
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.feedforward = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.norm2 = nn.LayerNorm(config.n_embd)

    def forward(self, x, cache=None):
        x = self.norm1(x + self.attention(x, cache))
        return self.norm2(x + self.feedforward(x))


class GPT(nn.Module):
    """Token ids in; out, at each position, a score for each character that could come next.

    An embedding is a table with a row of C numbers for each id: what the model knows of that
    character. Attention sees a set without order, so each position has a row as well. All of them
    start at random and are learned. (The first Transformer computed its positions, with sines.)"""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        # A ModuleList only holds its modules; forward runs them.
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size)
        # Matrices start at random, N(0, 0.02), normal with mean 0 and spread 0.02: different, so
        # that neurons, the outputs of a layer, learn different things; small, so that signals and
        # gradients neither explode nor vanish on their way through the layers. Norms start at 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, index, targets=None, cache=None):
        """index, targets: int64 (B, T), T <= block_size -> (logits (B, T, V), loss or None).

        Logits are scores; softmax makes shares of them. The loss is the cross-entropy, or negative
        log likelihood: the mean of -ln(share of the character that came). An untrained model's
        scores are all near 0, so it guesses about evenly, 1/V for each, which costs ln V: 4.38 for
        80 characters. (Mean squared error belongs to regression, where a quantity is to be met.)
        With a cache, index is still the whole text, but only the part from cache.length on is read
        and has logits."""
        end = index.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} characters do not fit: block_size is {self.config.block_size}")
        start = 0
        if cache is not None:
            start = cache.length
            cache.length = end
        x = self.tokens(index[:, start:]) + self.positions.weight[start:end]  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x, cache)
        logits = self.lm_head(self.norm(x))                        # (B, T, V)
        if targets is None:
            return logits, None
        logits_in_a_row = logits.flatten(0, 1).float()             # (B*T, V), float32 in any case
        loss = F.cross_entropy(logits_in_a_row, targets.flatten())
        return logits, loss

    @torch.no_grad()  # gradients are for learning only
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1: yields one new character at a time, (B, 1).

        A temperature below 1 makes likely characters likelier (0 always takes the likeliest), one
        above 1 evens them out. top_k allows only the k likeliest.
        The model sees block_size characters. When there are more, say 9 instead of 8, all but the
        last 4 are dropped. These get new positions, 0 to 3, so what the cache holds of them is
        wrong: it is emptied, and they are read again. On average a new character costs the same at
        any length."""
        block_size = self.config.block_size
        index = index[:, -block_size:]                          # crop to what the model can see
        cache = Cache()
        for _ in range(max_new_tokens):
            if index.shape[1] > block_size:
                index = index[:, -max(1, block_size // 2):]
                cache = Cache()
            logits, _ = self(index, cache=cache)                # (B, what was read, V)
            logits = logits[:, -1].float()                      # (B, V): only this guess is new
            logits = logits / max(temperature, 1e-6)
            if top_k:                                           # those below the k-th get share 0
                kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            shares = F.softmax(logits, dim=-1)
            drawn = torch.multinomial(shares, 1)                # (B, 1)
            index = torch.cat((index, drawn), dim=1)
            yield drawn

    def generate(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """index (B, T) with its continuation, (B, T + max_new_tokens). See stream."""
        return torch.cat([index, *self.stream(index, max_new_tokens, temperature, top_k)], dim=1)


# -------------------------------- learning ------------------------------------------------------

def autocast(config):
    """With dtype bfloat16, matrix products use 16 bits, faster where the processor has instructions
    for them. What needs more digits (norm, softmax, loss) stays float32."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def estimate_loss(model, splits, config):
    """Mean loss of each split, over eval_iters batches: {"train": float, "val": float}.

    The batches are spread evenly over the split and the same every time, so that two evaluations
    can be compared. eval() turns dropout off; no_grad() saves work that only learning needs.
    Overfitting is when train falls on while val rises: the model learns by heart. More text, more
    dropout, a smaller model or fewer steps help, and the weights with the lowest val are kept."""
    model.eval()
    means = {}
    for name, data in splits.items():
        last = len(data) - config.block_size - 1
        # eval_iters * B places from the first to the last, then B of them for each batch
        starts = np.linspace(0, last, config.eval_iters * config.batch_size, dtype=np.int64)
        total = 0.0
        for batch_starts in np.split(starts, config.eval_iters):
            x, y = get_batch(data, config, batch_starts)
            with autocast(config):
                logits, loss = model(x, y)
            total += loss.item()
        means[name] = total / config.eval_iters
    model.train()
    return means


def make_optimizers(model, config):
    """[AdamW], or [AdamW, Muon]: what moves the weights.

    A weight's gradient says how the loss changes if that weight grows a little. Gradient descent
    moves it the other way. Adam (Kingma and Ba 2014) keeps two running averages for each weight:
        average = 0.9 * average + 0.1 * gradient            (momentum: it evens out the noise)
        square = 0.99 * square + 0.01 * gradient ** 2       (as in RMSprop)
        weight = weight - learning_rate * average / sqrt(square)
    so that all weights move at a similar pace. 0.9 and 0.99 are its betas. The W (Loshchilov and
    Hutter 2017) is weight decay: each step also shrinks matrices a little, since large weights are
    the way to learn by heart. fused: one call moves all weights, instead of several for each."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = []
    if config.optimizer == "muon":  # an option, in part two, which takes some of the matrices
        matrices, muon = make_muon(model, config)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]  # a group has settings of its own
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.99), fused=True)
    return [adamw, *muon]


def learning_rate(step, config):
    """How far a step of gradient descent goes: too far overshoots, too short crawls. It climbs
    while the optimizer's averages are still guesses, then falls to a tenth, to settle: the cosine
    goes from 1 to -1, and with it the factor from 1 to 0.1. To find a good one, try a few, a factor
    of 3 apart, for some hundred steps."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def training_step(model, optimizers, batches, config, step):
    """One step of gradient descent: forward, backward, step. Returns the mean loss, a tensor.

    backward finds the gradients of all weights in one pass, from the loss back to the first layer,
    by the chain rule. batches: [(seed for dropout, x, y), ...]. More than one is gradient
    accumulation: their gradients add up before the weights move. That gives the gradients of one
    large batch, which would not fit into memory.
    Training is nothing but this, max_iters times, each time with fresh batches (see train)."""
    total = 0.0
    for seed, x, y in batches:
        torch.manual_seed(int(seed))  # dropout draws from it, so that a step can be done again
        with autocast(config):
            logits, loss = model(x, y)
        loss = loss / len(batches)  # so that their sum is the mean
        loss.backward()
        total += loss.detach()  # the number alone, without what backward needs
    # One odd batch must not throw the weights far: gradients that are too long, all as one vector,
    # are shortened (if grad_clip is 0, none are).
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # those of make_optimizers
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()  # backward adds to what is there, so the next step must find zeros
    return total


# That is all that a GPT is, and how it learns. A first reading may stop here: what follows keeps a
# run safe and makes it fast.

# ================================ Part two: the craft ===========================================

ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer", "chars")   # what the weights fit
FIXED = ARCHITECTURE + ("optimizer", "seed", "init_from", "corpus")     # the same for a whole run
OF_THE_MACHINE = ("out", "device", "dtype", "compile")                  # not from a checkpoint

# torchrun, PyTorch's starter, runs WORLD processes that train together, each with its RANK. Without
# it RANK is 0 and WORLD is 1. LOCAL_RANK counts the processes, and GPUs, of one machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def check(config):
    """A mistake is better found now than after an hour: ValueError names the setting."""
    choices = {"optimizer": ("adamw", "muon"), "dtype": ("float32", "bfloat16")}
    zero_is_fine = ("max_iters", "n_layer", "warmup_iters", "seed")
    for field in fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        fits = type(value) is kind or (kind is float and type(value) is int)  # 1 will do for 1.0
        if not fits:
            raise ValueError(f"{name} must be {kind.__name__}, not {value!r}")
        if name in choices and value not in choices[name]:
            raise ValueError(f"{name} must be {' or '.join(choices[name])}, not {value!r}")
        lowest = 1 if kind is int and name not in zero_is_fine else 0
        highest = {"dropout": 0.99, "n_layer": 1000}.get(name, 2**31)
        if kind in (int, float) and not lowest <= value <= highest:
            raise ValueError(f"{name} must be from {lowest} to {highest}, not {value}")
    config.out = config.out or Path(config.data or "model").resolve().stem + ".pkl"


def choose_settings(flags):
    """{name: value} of the flags given -> Config. A flag beats the checkpoint, and that beats the
    device's defaults. A run that goes on takes all of its checkpoint but OF_THE_MACHINE, one that
    fine-tunes takes the ARCHITECTURE."""
    settings = {}  # for a CPU, the values in Config are right
    if flags.get("device", Config.device) == "cuda":
        settings = dict(batch_size=64, block_size=256, max_iters=1500, n_embd=384, n_head=8,
                        n_layer=8, dropout=0.2, learning_rate=1e-3, warmup_iters=200, eval_iters=20)
        settings["compile"] = find_spec("triton") is not None  # which torch.compile needs
        if torch.cuda.is_bf16_supported(including_emulation=False):
            settings["dtype"] = "bfloat16"
    config = Config(**flags)  # it knows what the checkpoint is called
    path, saved = find_checkpoint(config)
    for name, value in saved.get("config", {}).items():
        if name in ARCHITECTURE or (path == config.out and name not in OF_THE_MACHINE):
            settings[name] = value
    settings.update(flags, out=config.out)
    return Config(**settings)


# -------------------------------- checkpoints ---------------------------------------------------

def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors. Killed at any instant, it leaves the old file or
    the new one, whole. OSError if it cannot be written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp").absolute()  # a name for each process
    # First goes what killed processes have left. (On Linux, /proc lists those that live.)
    for old in temporary.parent.glob(f"{Path(path).name}.*.tmp"):
        process = old.name.split(".")[-2]
        if Path("/proc/self").exists() and not Path("/proc", process).exists():
            old.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before the old file goes
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise OSError(f"{path}: not saved, and as it was before: {error}")
    finally:
        temporary.unlink(missing_ok=True)


def restore(optimizers, states):
    """Gives optimizers their running averages back, in the shapes of the weights. A damaged file
    may hold smaller ones, and PyTorch's fused AdamW would write past their end: RuntimeError."""
    for optimizer, state in zip(optimizers, states, strict=True):
        settings = optimizer.state_dict()["param_groups"]  # of this run, not of the file
        optimizer.load_state_dict({"state": state, "param_groups": settings})
        for p, averages in optimizer.state.items():
            # AdamW keeps the number of steps and two averages for each weight, Muon one.
            shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if isinstance(optimizer, torch.optim.Muon):
                shapes = {"momentum_buffer": p.shape}
            for name, shape in shapes.items():  # reshape fails if the file has another size
                averages[name] = averages[name].reshape(shape).contiguous()


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, onto the CPU; ValueError if a file is anything else.

    A pickle is Python's way to write objects to a file, and reading one can run any code;
    weights_only=True reads nothing but tensors and plain values, so a stranger's file is safe. The
    weights are tried on a model on the meta device, where tensors have shapes but no memory."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            model = GPT(Config(**saved["config"]), CharTokenizer(saved["chars"]).vocab_size)
        # A trial, whose results are thrown away: do names and shapes fit? assign=True puts the
        # file's tensors into the model, since those without memory cannot be copied into.
        model.load_state_dict(dict(saved["best"]), assign=True)
        model.load_state_dict(dict(saved["model"]), assign=True)
        restore(make_optimizers(model, model.config), saved["optimizer"])
        saved.update(step=int(saved["step"]), losses=dict(saved["losses"]), corpus=saved["corpus"])
    except Exception as error:
        raise ValueError(f"{path}: no checkpoint of gpt.py, or damaged: {error!r:.150}")
    return saved


def find_checkpoint(config):
    """[path, checkpoint] that a run starts from: its own, else that of init_from, else ["", {}]."""
    path = config.out if os.path.exists(config.out) else config.init_from
    found = [path, load_checkpoint(path) if path and RANK == 0 else {}]
    if WORLD > 1:  # overwrites found in the others: only process 0's machine needs the file
        torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found


def load_model(path, device="cpu"):
    """A checkpoint -> (model with its best weights, in eval mode; tokenizer; config). Raises what
    load_checkpoint does."""
    saved = load_checkpoint(path)
    config = replace(Config(**saved["config"]), device=find_device(device))
    model = GPT(config, len(saved["chars"]))
    model.load_state_dict(saved["best"])
    return model.to(device).eval(), CharTokenizer(saved["chars"]), config


# -------------------------------- a run ---------------------------------------------------------

def find_device(name):
    """The device of that name, ready for use; ValueError if this machine has none.

    A CPU has few fast cores, a GPU thousands of slow ones, which suits matrix products. CUDA is how
    NVIDIA's are programmed. .to(device) moves tensors; those that meet must be on the same one."""
    if name not in ("cpu", "cuda", "mps") or not getattr(torch, name).is_available():
        raise ValueError(f"device must be cpu, cuda or mps, and in this machine, not {name!r}")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # one for each process
        torch.set_float32_matmul_precision("high")  # TF32: fewer digits, far faster
    return name


def build(config, vocab_size):
    """(a new model on its device, its optimizers, and the same weights in a form for training)."""
    torch.manual_seed(config.seed)
    model = GPT(config, vocab_size).to(find_device(config.device))
    fast = torch.compile(model) if config.compile else model
    if WORLD > 1:  # each process gets the mean of their gradients
        fast = nn.parallel.DistributedDataParallel(fast)
    return model, make_optimizers(model, config), fast


def make_muon(model, config):
    """(the matrices that are left to AdamW, [Muon]). Muon (Jordan 2024) moves those of the blocks.
    It evens out their momentum (makes it roughly orthogonal), so that a matrix moves about as far
    in each direction. match_rms_adamw lets it use AdamW's learning rate."""
    in_blocks = [{"params": [p for p in model.blocks.parameters() if p.ndim == 2]}]
    muon = torch.optim.Muon(in_blocks, config.learning_rate, config.weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    return [model.tokens.weight, model.positions.weight, model.lm_head.weight], [muon]


def draw_batches(data, config, step):
    """This process's part of a step, [(seed, x, y), ...]. All random numbers follow from seed and
    step: a resumed run draws what it would have drawn, and several processes together draw what one
    would. Of two, the first takes batches 0, 2, 4 and so on, and the second the others."""
    draw = np.random.default_rng((config.seed, step))
    starts = draw.integers(0, len(data) - config.block_size, (config.grad_accum, config.batch_size))
    batches = []
    for micro in range(RANK, config.grad_accum, WORLD):
        # This makes one seed of three numbers.
        seed = np.random.SeedSequence((config.seed, step, micro)).generate_state(1, np.uint64)[0]
        batches.append((seed, *get_batch(data, config, starts[micro])))
    return batches


def printable(text):
    """Text for a terminal: control characters, which could move its cursor or turn the direction of
    writing, become UNK; tab (09) and line end (0a) stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", UNK, text)


def sample(model, tokenizer, length):
    """Some text that the model writes now. Training is not disturbed: it seeds every batch anew."""
    torch.manual_seed(model.config.seed)
    start = torch.tensor([[tokenizer.end]], device=model.config.device)
    ids = model.eval().generate(start, length, temperature=0.8)[0, 1:]
    model.train()
    return printable(tokenizer.decode(ids.tolist()).replace(END, "\n"))


def describe(splits, tokenizer, config):
    """A line about a corpus, by which a resumed run knows it again. The checksum is over the first
    8 million characters of each split, since a corpus can have 40 GB."""
    ids = np.concatenate([split[: 2**23] for split in splits.values()])
    text = (f"{len(splits['train']):,} characters to train on, {len(splits['val']):,} to validate, "
            f"vocabulary {tokenizer.vocab_size:,}, {np.mean(ids == tokenizer.unk):.2%} unknown, "
            f"checksum {zlib.crc32(ids):08x}")
    if config.data.endswith(".jsonl"):
        pairs = tokenizer.decode(ids).split(END)[:-1]
        longer = [pair for pair in pairs if len(pair) >= config.block_size]  # END counts as well
        text += f", {len(longer) / len(pairs):.1%} of pairs longer than block_size"
    return text


STOP = threading.Event()  # a flag, set at Ctrl-C and SIGTERM, by which systems end a program


def ask_to_stop(number, frame):
    """Python calls this at such a signal: train ends after the step under way, and saves."""
    STOP.set()
    signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once


def train(config):
    """Trains, or carries on where config.out stopped; returns the model with its latest weights, in
    eval mode. ValueError or OSError where the user must change something.

    Each evaluation saves. A run that is killed loses the steps since then; the same command does
    them again, and ends with the same weights as if it had never been stopped."""
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by {WORLD} processes")
    path, saved = find_checkpoint(config)
    resuming = path == config.out  # else it is that of init_from, or ""
    splits, tokenizer = load_data(config, saved.get("chars", ""))
    corpus = describe(splits, tokenizer, config)
    tqdm.write(f"corpus  {config.data or 'the Python documentation'}: {corpus}")
    # What a checkpoint holds: this, the best and the latest weights and the optimizers' averages.
    run = dict(config=asdict(config), chars=tokenizer.chars, corpus=corpus, step=0, losses={})

    # A trained model is never overwritten by another one: the checkpoint must fit these settings.
    if saved:
        old = dict(saved["config"], chars=saved["chars"], corpus=saved["corpus"])
        new = dict(asdict(config), chars=tokenizer.chars, corpus=corpus)
        for name in FIXED if resuming else ARCHITECTURE:
            if old[name] != new[name]:
                raise ValueError(f"{path} was trained with {name} {old[name]!s:.200}, not "
                                 f"{new[name]!s:.200}: leave the flag out or name another --out")

    model, optimizers, fast = build(config, tokenizer.vocab_size)
    if resuming:
        run.update(step=saved["step"], losses=saved["losses"], best=saved["best"])
        model.load_state_dict(saved["model"])
        restore(optimizers, saved["optimizer"])
    elif saved:  # fine-tuning starts from the best weights
        model.load_state_dict(saved["best"])
    size = sum(p.numel() for p in model.parameters())
    tqdm.write(f"model   {size:,} parameters on {config.device} in {config.dtype}, {config.out}, "
               f"at step {run['step']:,} of {config.max_iters:,}")

    # The bar counts characters, of which a step has many. None hides it where there is no terminal.
    bar = tqdm(range(run["step"], config.max_iters + 1), initial=run["step"], unit="char",
               unit_scale=config.batch_size * config.grad_accum * config.block_size,
               total=config.max_iters, disable=RANK > 0 or None)
    for step in bar:
        stopping = STOP.is_set()
        due = step % config.eval_interval == 0 or step == config.max_iters
        evaluating = due and step not in run["losses"]  # it is, if a stop came just behind
        if evaluating:
            run["losses"][step] = estimate_loss(model, splits, config)
            train_loss, val_loss = run["losses"][step].values()
            if math.isnan(val_loss):
                raise ValueError(f"step {step}: the loss is no number; lower --learning_rate")
            # The answers of held-out pairs are facts that the model was never told. Their loss
            # rises while it learns, so of pairs the latest weights are kept.
            lowest = min(row["val"] for row in run["losses"].values())
            if val_loss == lowest or config.data.endswith(".jsonl"):
                run["best"] = {name: p.clone() for name, p in model.state_dict().items()}
            text = " ".join(sample(model, tokenizer, 60).split())
            tqdm.write(f"step {step:6,d}   train {train_loss:.4f}   val {val_loss:.4f}   {text}")
        if (evaluating or stopping) and RANK == 0:
            averages = [optimizer.state_dict()["state"] for optimizer in optimizers]
            run.update(step=step, model=model.state_dict(), optimizer=averages)
            save_checkpoint(config.out, run)
        if stopping:
            tqdm.write(f"stopped at step {step:,}; the same command carries on")
        if stopping or step == config.max_iters:
            break
        batches = draw_batches(splits["train"], config, step)
        loss = training_step(fast, optimizers, batches, config, step)
        if step % 10 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    report(run, model, tokenizer)
    return model.eval()


def report(run, model, tokenizer):
    """Prints what came out of a run and how to go on."""
    curve = [row["val"] for row in run["losses"].values()]
    heights = np.interp(curve, (min(curve), max(curve)), (0, 7))
    bars = "".join("▁▂▃▄▅▆▇█"[round(height)] for height in heights)
    tqdm.write(f"losses  last {curve[-1]:.4f}, best {min(curve):.4f}   {bars}")
    if model.config.device == "cuda":
        used = torch.cuda.max_memory_allocated() / 2**30
        tqdm.write(f"memory  {used:.2f} GiB of the GPU at most")
    tqdm.write(sample(model, tokenizer, 500))
    tqdm.write(f"\nsaved; talk to it: python chat.py --model {shlex.quote(model.config.out)}")


def tune(config):
    """Times training with different settings at an unchanged total batch (lessons: auto-tuning and
    efficiency testing, for only what is measured can be made faster)."""
    splits, tokenizer = load_data(config)
    total = config.batch_size * config.grad_accum
    rates = {}
    ways = itertools.product((1, 2, 4), ("float32", "bfloat16"), ("--no-compile", "--compile"))
    for accum, dtype, compiled in ways:
        trial = replace(config, batch_size=max(1, total // accum), grad_accum=accum, dtype=dtype,
                        compile=compiled == "--compile")
        flags = f"--batch_size {trial.batch_size} --grad_accum {accum} --dtype {dtype} {compiled}"
        try:
            model, optimizers, fast = build(trial, tokenizer.vocab_size)
            for step in range(6):
                if step == 2:  # the first two warm up, four are timed
                    start = time.perf_counter()
                batches = draw_batches(splits["train"], trial, step)
                # A GPU is still busy when a call returns; item waits until it is done.
                training_step(fast, optimizers, batches, trial, step).item()
            rates[flags] = 4 * total * config.block_size / (time.perf_counter() - start)
            print(f"{rates[flags]:12,.0f} characters a second   {flags}")
        except (RuntimeError, MemoryError) as error:
            print(f"failed: {error!r:.60}   {flags}")
    print(f"fastest: python gpt.py {max(rates, key=rates.get)}")


# -------------------------------- the command line ----------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake is one line on stderr and exit status 2."""
        self.exit(2, f"{self.prog}: {printable(' '.join(str(message).split()))}\n")


def main(argv=None):
    """Each field of Config is a flag; --help shows them as they stand above."""
    settings = inspect.getsource(Config).partition("\n\n")[0]  # the text of the class
    parser = Parser(description=settings, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)  # absent if not given
    for field in fields(Config):
        if field.type is bool:  # --compile and --no-compile
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(f"--{field.name}", type=field.type)
    parser.add_argument("--tune", action="store_true", help="find the fastest settings instead")
    flags = vars(parser.parse_args(argv))
    work = tune if flags.pop("tune", False) else train
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends Python, without a traceback
    if work is train and WORLD == 1:
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
    if WORLD > 1:
        # How processes talk to each other: through gloo between CPUs, nccl between GPUs.
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backends)
    if RANK > 0:  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")
    try:
        config = choose_settings(flags)
        work(config)
    except (ValueError, OSError) as error:
        parser.error(error)
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith("torch._"):  # a part of torch.compile
            parser.error(f"torch.compile failed, so try --no-compile: {error!s:.200}")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            half, double = max(1, config.batch_size // 2), 2 * config.grad_accum
            parser.error(f"out of memory: try --batch_size {half} --grad_accum {double}, and then "
                         "a smaller block_size, n_embd or n_layer")
        raise
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # A terminal without UTF-8 shows "?" and does not stop the run; a log file grows line by line.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main()
