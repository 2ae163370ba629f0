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
import argparse, atexit, inspect, itertools, json, math, os, re, signal, sys, timeit, zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
from tqdm import tqdm


# ================================ Part one: the lesson ==========================================
@dataclass
class Config:
    """The settings of a run: people choose these, while parameters are what the model learns. From
    the lines below, dataclass makes an __init__: Config(n_layer=2) changes one of them."""
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
    grad_clip: float = 1.0        # limit for gradients (see training_step); 0: no limit
    eval_interval: int = 150      # steps between two evaluations, each of which saves
    eval_iters: int = 10          # batches that an evaluation reads of each split
    seed: int = 1337              # where the random numbers start
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # float32, or bfloat16: half the bits, faster on some machines
    compile: bool = False         # let torch.compile turn the model into faster code

    def __post_init__(self):
        check(self)  # in part two; dataclass calls __post_init__ at the end of its __init__


# -------------------------------- tokenizer and data --------------------------------------------
END = "\x03"    # ASCII's "end of text" closes each document and answer: so the model learns to stop
UNK = "\ufffd"  # Unicode's replacement character stands for whatever is not in the vocabulary


class CharTokenizer:
    """Turns characters into token ids and back (lesson: encoder and decoder are inverse maps).
    The vocabulary is the sorted set of characters, with END and UNK. It is small, but texts become
    long; with words it would be the reverse; subwords (as in GPT-2) are in between. The course has
        char_to_id = {char: id for id, char in enumerate(chars)}
        id_to_char = {id: char for id, char in enumerate(chars)}
    Here chars[id] is the character of an id. To look up a whole text at once, code_to_id is an
    array with a place for each code, the number of a character in Unicode: ord("h") is 104."""

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
        utf32 = text.encode("utf-32-le", "surrogatepass")  # their codes, in 4 bytes each
        codes = np.frombuffer(utf32, np.uint32)            # as numbers: "hi" is 104, 105
        return self.code_to_id[codes]

    def decode(self, ids):
        """Ids, a list or an integer array -> str."""
        return "".join(self.chars[id] for id in ids)


def clean(text):
    """Windows' line ends become plain ones. An END inside a text becomes UNK: it is ours to set."""
    return text.replace("\r\n", "\n").replace(END, UNK)


def read_documents(path):
    """A list of texts. Of a .jsonl: one for each line, {"prompt": ..., "completion": ...}. Of any
    other file: the whole, in UTF-8; bytes that are not UTF-8 become UNK. Without a path: the
    documentation that every CPython carries, half a million characters."""
    if not path:
        from pydoc_data.topics import topics
        return topics.values()
    text = Path(path).read_bytes().decode("utf-8-sig", "replace")  # sig: drops a byte-order mark
    if not path.endswith(".jsonl"):
        return [text]
    documents = []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            pair = json.loads(line)
            documents.append(pair["prompt"] + "\n" + pair["completion"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: no object with prompt and completion texts")
    return documents


def load_data(config, chars=""):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer); 1-D uint16 ids.
    The first 90 % are for training, the rest for validation: an exam needs questions that the
    homework did not have, or learning by heart would look like learning. A folder is what
    prepare_owt.py made of a corpus larger than memory: np.memmap looks like an array, but reads
    from its file only what is used. chars: the vocabulary of a model to start from, if any.
    ValueError if the corpus is too short or damaged, OSError if it cannot be read."""
    if os.path.isdir(config.data):
        tokenizer = CharTokenizer(json.loads(Path(config.data, "vocab.json").read_text("utf-8")))
        train = np.memmap(Path(config.data, "train.bin"), "<u2", "r")  # 2-byte integers, read only
        val = np.memmap(Path(config.data, "val.bin"), "<u2", "r")
    else:
        text = "".join(clean(document) + END for document in read_documents(config.data))
        tokenizer = CharTokenizer(chars or text)
        ids = tokenizer.encode(text)
        cut = int(0.9 * len(ids))
        train, val = np.split(ids, [cut])
        if config.data.endswith(".jsonl"):
            cut = text.rfind(END, 0, cut) + 1  # back to where a pair ends
            # A few pairs are repeated until a block fits: of 50 ids, 3 copies are longer than 128.
            train = np.tile(ids[:cut], 1 + config.block_size // max(1, cut))
            val = np.tile(ids[cut:], 1 + config.block_size // max(1, len(ids) - cut))
    if min(len(train), len(val)) <= config.block_size:
        raise ValueError(f"{config.data}: too short for block_size {config.block_size}: lower it")
    return {"train": train, "val": val}, tokenizer


def get_batch(data, config, starts=None):
    """Blocks of text, and what follows each character in them: (x, y), int64 (B, T).
    A block of T characters holds T examples, one for each beginning: after "h" comes "e", after
    "he" comes "l". A batch is B blocks, stacked. Both are tensors: arrays of numbers with a shape,
    a type (dtype) and a device that holds them. Ids are int64, since embeddings are indexed with
    integers. Types must agree: "expected Long but found Float" means float32 where ids should be.
    With T = 2, starts [5, 9] (random if None) read the places [5, 6, 7] and [9, 10, 11]."""
    if starts is None:
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,)).numpy()
    places = starts[:, None] + np.arange(config.block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    # An id for each place, in pinned memory if a GPU is to copy it while Python goes on.
    blocks = torch.tensor(data[places].astype(np.int64), pin_memory=config.device == "cuda")
    blocks = blocks.to(config.device, non_blocking=blocks.is_pinned())
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
        # In a matrix product each number is a row times a column, summed; inner sizes must agree:
        # (T, D) @ (D, T) -> (T, T), a score for each pair of positions, in each text and head.
        scores = q @ k.transpose(-2, -1)                          # (B, H, T, T)
        # A sum of D products grows like sqrt(D), as plus and minus partly cancel (100 coin tosses,
        # +1 or -1 each, sum up to some 10, not 100). With large scores softmax picks one winner,
        # and the others' shares and gradients are near 0.
        scores = scores / math.sqrt(D)
        # Position t sees positions 0 to t, the lower triangle: the rest is the future, which the
        # model is to predict. (The course keeps this constant mask in a register_buffer.)
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
        # Softmax: e ** score over the sum of the row. These are shares of 1; e ** -inf is 0.
        shares = scores.softmax(dim=-1)                           # (B, H, T, T)
        return shares @ v                                         # (B, H, T, D)

    def forward(self, q, k, v):
        # The same in one call, which never stores the T x T scores; is_causal is the mask. (When
        # one query comes alone, that of the newest character, it may see all keys: no mask.)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


class MultiHeadAttention(nn.Module):
    """Several heads read the same text at the same time, like several readers of one book, each
    with questions of its own. Their findings are joined and mixed. (B, T, C) -> (B, T, C).
    An nn.Linear is Wx + b: a matrix product with learned weights W, and a learned bias b. An
    nn.Module finds the parameters inside it, so that the optimizer can be handed all of them,
    .to(device) moves all of them and state_dict() saves all of them.
    cache: what generation keeps, {module: (keys, values)} of the characters read. Nobody looks
    ahead, in any layer, so a later character cannot change the key and value of an earlier one.
    They are computed once: a new character costs 1 position's work, not T's."""

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
        # C is cut into H pieces of D; then T and H change places: each head gets a (T, D).
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
    """Linear, ReLU, Linear: each character thinks about what it has seen. (B, T, C) -> (B, T, C),
    with 4 C in between, as is custom. A Sequential runs its modules in turn: that is its forward.
    ReLU makes negative numbers 0; without it, two linear maps would be one, since A(Bx) = (AB)x.
    (Sigmoid and tanh bend too, but are flat for large inputs, where gradients are near 0.) Dropout
    turns off random activations (numbers between layers) in training: none can rely on another."""

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU(),
                         nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))


class Block(nn.Module):
    """Attention, then feed-forward: one layer of the model. (B, T, C) -> (B, T, C).
    Each result is added to its input. This residual keeps what was known, and gives learning a
    short way back to the first layers, since gradients pass a sum unchanged. The norm gives each
    character's C numbers mean 0 and variance 1, so that sums keep one scale. Here it follows the
    sum: post-norm, as in the course. GPT-2 uses pre-norm, x + sublayer(norm(x)).
    The first Transformer was a translator: an encoder read one language, a decoder wrote the other
    and also looked at what the encoder had read (cross-attention). This is the decoder alone."""

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
        # Matrices start at random, N(0, 0.02): normal, with mean 0 and spread 0.02. They differ, so
        # that neurons, the outputs of a layer, learn different things. They are small, so that
        # signals and gradients neither explode nor vanish on their way through the layers.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, index, targets=None, cache=None, start=0):
        """index, targets: int64 (B, T), T <= block_size -> (logits (B, T, V), loss or None).
        Logits are scores; softmax makes shares of them. The loss is the cross-entropy, or negative
        log likelihood: the mean of -ln(share of the character that came). An untrained model's
        scores are all near 0, so it guesses about evenly, 1/V for each, which costs ln V: 4.38 for
        80 characters. (Mean squared error is for regression, which predicts a quantity.)
        In generation, index is only what the cache does not hold, and start is its position."""
        end = start + index.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} characters do not fit: block_size is {self.config.block_size}")
        x = self.tokens(index) + self.positions.weight[start:end]  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x, cache)
        logits = self.lm_head(self.norm(x))                        # (B, T, V)
        if targets is None:
            return logits, None
        # The loss needs float32. Shapes: (B, T, V) -> (B*T, V) and (B, T) -> (B*T,)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    @torch.no_grad()  # gradients are for learning only
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1, by one new character at a time, (B, 1): yield
        hands it out, and goes on from there when the next one is asked for.
        A temperature below 1 makes likely characters likelier (0 always takes the likeliest), one
        above 1 evens them out. top_k allows only the k likeliest.
        The model sees block_size characters. When there are more, say 9 instead of 8, all but the
        last 4 are dropped. These get new positions, 0 to 3, so what the cache holds of them is
        wrong: they are read again. That is once in half a block, however long the text is."""
        index = index[:, -self.config.block_size:]              # crop to what the model can see
        cache = {}
        for _ in range(max_new_tokens):
            if index.shape[1] > self.config.block_size:         # full: go on with its last half
                index = index[:, -max(1, self.config.block_size // 2):]
                cache = {}
            start = index.shape[1] - 1 if cache else 0          # then only the newest is read
            logits, _ = self(index[:, start:], cache=cache, start=start)
            logits = logits[:, -1].float()                      # (B, V): the next character's
            logits = logits / max(temperature, 1e-6)
            if top_k:                                           # those below the k-th get share 0
                kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            shares = logits.softmax(dim=-1)
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
    Overfitting is when train keeps falling while val rises: it learns by heart. More text, more
    dropout, a smaller model or fewer steps help, and the weights with the lowest val are kept."""
    model.eval()
    means = {}
    for name, data in splits.items():
        last = len(data) - config.block_size - 1
        # eval_iters * B places from the first to the last, then B of them for each batch
        starts = np.linspace(0, last, config.eval_iters * config.batch_size, dtype=np.int64)
        batches = [get_batch(data, config, part) for part in np.split(starts, config.eval_iters)]
        with autocast(config):
            losses = [model(x, y)[1].item() for x, y in batches]
        means[name] = sum(losses) / len(losses)
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
    Hutter 2017) is weight decay: each step also shrinks matrices a little, since learning
    by heart needs large weights. fused: one call moves all weights, instead of several for each."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    muon = []
    if config.optimizer == "muon":  # an option, in part two, which takes some of the matrices
        matrices, muon = make_muon(model, config)
    # Groups of parameters have settings of their own: biases and norms are not shrunk.
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.99), fused=True)
    return [adamw, *muon]


def learning_rate(step, config):
    """How far a step of gradient descent goes: too far overshoots, too short crawls. It climbs
    while the optimizer's averages are still guesses, then falls to a tenth, to settle: the cosine
    goes from 1 to -1, and with it the factor from 1 to 0.1. To find a good rate, try a few, each 3
    times the last, for some hundred steps."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def training_step(model, optimizers, batches, config, step):
    """One step of gradient descent: forward, backward, step. Returns the mean loss, a tensor.
    backward finds the gradients of all weights in one pass, from the loss back to the first layer,
    by the chain rule. batches: [(seed for dropout, x, y), ...]. More than one is gradient
    accumulation: their gradients add up to those of one large batch, too large for the memory.
    Training is nothing but this, max_iters times, each time with fresh batches (see train)."""
    total = 0.0
    for seed, x, y in batches:
        torch.manual_seed(int(seed))  # dropout draws from it, so that a step can be done again
        with autocast(config):
            logits, loss = model(x, y)
        loss = loss / len(batches)  # the batches' losses add up to their mean
        loss.backward()
        total += loss.detach()  # the number alone, without what backward needs
    # One odd batch must not throw the weights far: where the gradients, all as one vector, are
    # longer than grad_clip (if it is not 0), they are shortened to that.
    nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # those of make_optimizers
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()  # backward adds to what is there, so the next step must find zeros
    return total


# That is all that a GPT is, and how it learns. A first reading may stop here.
# ================================ Part two: the craft ===========================================
# A checkpoint is a saved model with its settings, its vocabulary (chars) and a line about its text
# (corpus). A run that uses its weights must have the same ARCHITECTURE; to carry on, all of FIXED.
ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer", "chars")
FIXED = ARCHITECTURE + ("optimizer", "seed", "init_from", "corpus")
OF_THE_MACHINE = ("out", "device", "dtype", "compile")  # never taken from a checkpoint
# torchrun, PyTorch's starter, runs WORLD processes that train together, each with its RANK. Without
# it RANK is 0 and WORLD is 1. LOCAL_RANK counts the processes, and GPUs, of one machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def check(config):
    """A mistake is better found now than after an hour: ValueError names the setting."""
    devices = [name for name in ("cpu", "cuda", "mps") if getattr(torch, name).is_available()]
    choices = dict(optimizer=["adamw", "muon"], dtype=["float32", "bfloat16"], device=devices)
    for field in fields(config):  # a field of the dataclass has a name, a type and more
        name, kind, value = field.name, field.type, getattr(config, field.name)
        fits = type(value) is kind or (kind is float and type(value) is int)  # 1 will do for 1.0
        if not fits or (name in choices and value not in choices[name]):
            raise ValueError(f"{name} must be {choices.get(name, kind.__name__)}, not {value!r}")
        low = 0 if kind is float or name in ("max_iters", "n_layer", "warmup_iters", "seed") else 1
        high = {"dropout": 0.99, "n_layer": 1000}.get(name, 2**31)
        if kind in (int, float) and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    config.out = config.out or Path(config.data or "model").resolve().stem + ".pkl"  # book.pkl


def choose_settings(flags):
    """{name: value} of the flags given -> Config. A flag beats the checkpoint, and that beats the
    device's defaults. A run that carries on takes all settings from its checkpoint except those
    OF_THE_MACHINE. One that fine-tunes (init_from) takes only the ARCHITECTURE."""
    settings = {}  # for a CPU, the values in Config are right
    if flags.get("device", Config.device) == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        settings = dict(batch_size=64, block_size=256, max_iters=1500, n_embd=384, n_head=8,
                        n_layer=8, dropout=0.2, learning_rate=1e-3, warmup_iters=200, eval_iters=20,
                        dtype=dtype, compile=sys.platform == "linux")  # torch has triton there
    config = Config(**flags)  # for now: its out and init_from tell which checkpoint is meant
    carries_on, saved = find_checkpoint(config)
    for name, value in saved.get("config", {}).items():
        if name in ARCHITECTURE or (carries_on and name not in OF_THE_MACHINE):
            settings[name] = value
    return replace(config, **dict(settings, **flags))  # a copy with these settings


# -------------------------------- checkpoints ---------------------------------------------------
def save_checkpoint(path, checkpoint):
    """Writes a dict. Killed at any instant, it leaves the old file or the new one, whole."""
    temporary = Path(f"{path}.{os.getpid()}.tmp").absolute()  # model.pkl.4711.tmp in process 4711
    # First remove what killed processes left: on Linux, /proc has a folder for each running one.
    for old in temporary.parent.glob(f"{Path(path).name}.*.tmp"):
        process = Path("/proc", old.name.split(".")[-2])
        if process.parent.exists() and not process.exists():
            old.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file)  # on the disk, before the old file goes
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be saved, the file is as it was: {error}")


def restore(optimizers, states):
    """Gives optimizers back what they keep for each weight: the number of steps and the averages.
    PyTorch's fused AdamW does not check their sizes: if a damaged file has shorter ones, it reads
    and writes past their end. So each must have the size of its weight, or RuntimeError."""
    kept = dict(AdamW=("step", "exp_avg", "exp_avg_sq"), Muon=("momentum_buffer",))
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))  # replaces state only
        for p, averages in optimizer.state.items():
            for name in kept[type(optimizer).__name__]:
                shape = () if name == "step" else p.shape  # reshape fails for another size
                averages[name] = averages[name].reshape(shape).contiguous()


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, onto the CPU; ValueError if a file is anything else.
    A pickle is Python's way to write objects to a file, and reading one can run any code;
    weights_only=True reads nothing but tensors and plain values, so a stranger's file is safe."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**dict(saved["config"], device="cpu"))  # this machine may have no GPU
        # A trial, then thrown away: do names and shapes fit? Tensors on the meta device have shapes
        # but no memory to copy into, so assign=True puts the file's in their place.
        with torch.device("meta"):
            model = GPT(config, CharTokenizer(saved["chars"]).vocab_size)
        model.load_state_dict(dict(saved["best"]), assign=True)
        model.load_state_dict(dict(saved["model"]), assign=True)
        restore(make_optimizers(model, config), saved["optimizer"])
        # A check of the rest: int, dict and saved[...] fail where something is wrong or missing.
        saved.update(step=int(saved["step"]), losses=dict(saved["losses"]), corpus=saved["corpus"])
    except Exception as error:
        raise ValueError(f"{path}: no checkpoint of gpt.py, or damaged: {error!r:.150}")
    return saved


def find_checkpoint(config):
    """[does the run carry on?, the checkpoint of out, else of init_from, else {}]."""
    carries_on = os.path.exists(config.out)
    path = config.out if carries_on else config.init_from
    found = [carries_on, load_checkpoint(path) if path and RANK == 0 else {}]
    if WORLD > 1:  # process 0 sends what it found to the others
        torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found


def load_model(path, device="cpu"):
    """A checkpoint -> (model with its best weights, in eval mode; tokenizer; config)."""
    saved = load_checkpoint(path)
    model = GPT(Config(**dict(saved["config"], device=device)), len(saved["chars"])).to(device)
    model.load_state_dict(saved["best"])
    return model.eval(), CharTokenizer(saved["chars"]), model.config


# -------------------------------- a run ---------------------------------------------------------
def build(config, vocab_size):
    """Returns a new model on its device, its optimizers, and the model in a form for training.
    A CPU has few fast cores, a GPU thousands of slow ones, which suits matrix products. CUDA is how
    NVIDIA's GPUs are programmed. .to(device) moves tensors; a product needs both on one."""
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # one for each process
        torch.set_float32_matmul_precision("high")  # TF32: fewer digits, far faster
    torch.manual_seed(config.seed)
    model = GPT(config, vocab_size).to(config.device)
    fast = torch.compile(model) if config.compile else model
    fast = nn.parallel.DistributedDataParallel(fast) if WORLD > 1 else fast  # averages gradients
    return model, make_optimizers(model, config), fast


def make_muon(model, config):
    """Returns the matrices left to AdamW, and [Muon] for those of the blocks (Jordan 2024).
    Like Adam it averages gradients, but then changes the average so that a matrix is moved equally
    far in all directions (nearly). match_rms_adamw makes it work with AdamW's learning rate."""
    group = [{"params": [p for p in model.blocks.parameters() if p.ndim == 2]}]
    muon = torch.optim.Muon(group, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [model.tokens.weight, model.positions.weight, model.lm_head.weight], [muon]


def draw_batches(data, config, step):
    """Yields (seed, x, y) for this process's batches of a step: of two processes, the first takes
    batches 0, 2, 4 and so on. All random numbers follow from seed and step: a resumed run draws
    what it would have drawn, and several processes together draw what one would."""
    draw = np.random.default_rng((config.seed, step))
    starts = draw.integers(0, len(data) - config.block_size, (config.grad_accum, config.batch_size))
    for micro in range(RANK, config.grad_accum, WORLD):
        # One number made of three: a seed that no other batch has.
        seed = np.random.SeedSequence((config.seed, step, micro)).generate_state(1, np.uint64)[0]
        yield seed, *get_batch(data, config, starts[micro])


def printable(text):
    """Text for a terminal: control characters, and those that turn the direction of writing (202a
    to 2069), become UNK; tab (09) and line end (0a) stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", UNK, text)


def sample(model, tokenizer, length):
    """Some text that the model writes now. Training is not disturbed: it seeds every batch anew."""
    torch.manual_seed(model.config.seed)
    start = torch.tensor([[tokenizer.end]], device=model.config.device)
    ids = model.eval().generate(start, length, temperature=0.8)[0, 1:]
    model.train()
    return printable(tokenizer.decode(ids.tolist()).replace(END, "\n"))


def describe(splits, tokenizer, config):
    """A line by which to recognize a corpus. Of each split, 8 million characters are looked at."""
    ids = np.concatenate([split[: 2**23] for split in splits.values()])
    text = (f"{sum(map(len, splits.values())):,} characters, vocabulary {tokenizer.vocab_size:,}, "
            f"{np.mean(ids == tokenizer.unk):.2%} unknown, checksum {zlib.crc32(ids):08x}")
    if config.data.endswith(".jsonl"):
        lengths = np.diff(np.flatnonzero(ids == tokenizer.end), prepend=-1)  # ENDs at 3, 7: 4, 4
        text += f", {np.mean(lengths > config.block_size):.1%} of pairs longer than block_size"
    return text


STOP = []  # the signals that have asked this program to end


def ask_to_stop(number, frame):
    """Python calls this at Ctrl-C and SIGTERM (see main): train ends its step, saves and stops."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # the default: at a second one, Python ends at once


def train(config):
    """Trains, or carries on where config.out stopped; returns the model with its latest weights, in
    eval mode. Each evaluation saves. A run that is killed loses the steps since then; the same
    command does them again, and ends with the same weights as if it had never been stopped."""
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by {WORLD} processes")
    carries_on, saved = find_checkpoint(config)
    splits, tokenizer = load_data(config, saved.get("chars", ""))
    corpus = describe(splits, tokenizer, config)
    tqdm.write(f"corpus  {config.data or 'the Python documentation'}: {corpus}")
    # A checkpoint holds this, the best and the latest weights, and the averages of the optimizers.
    run = dict(config=asdict(config), chars=tokenizer.chars, corpus=corpus, step=0, losses={})
    model, optimizers, fast = build(config, tokenizer.vocab_size)
    if saved:
        # A trained model is never overwritten by another one: it must fit this run.
        old, new = dict(saved, **saved["config"]), dict(run, **run["config"])
        for name in FIXED if carries_on else ARCHITECTURE:
            if old[name] != new[name]:
                raise ValueError(f"the checkpoint was trained with {name} {old[name]!s:.99}, not "
                                 f"{new[name]!s:.99}: leave the flag out or name another --out")
        # Fine-tuning starts from the best weights, and carrying on from the latest.
        model.load_state_dict(saved["model" if carries_on else "best"])
        if carries_on:
            restore(optimizers, saved["optimizer"])
            run = dict(saved, config=asdict(config))
    tqdm.write(f"model   {config.out} ({config.device}, {config.dtype}) at step {run['step']:,} of "
               f"{config.max_iters:,}, {sum(p.numel() for p in model.parameters()):,} parameters")
    # A loop over steps, with a progress bar that counts their characters. disable=None hides it
    # where there is no terminal. The last round, at max_iters, only evaluates.
    characters = config.batch_size * config.grad_accum * config.block_size  # of a step
    bar = tqdm(range(run["step"], config.max_iters + 1), initial=run["step"], unit="char",
               total=config.max_iters, unit_scale=characters, disable=RANK > 0 or None)
    losses = run["losses"]  # {step: {"train": loss, "val": loss}}
    # Evaluations are due every eval_interval steps and at the end; a resumed run has some already.
    due = {*range(0, config.max_iters, config.eval_interval), config.max_iters} - set(losses)
    for step in bar:
        stopping = len(STOP) > 0
        if step in due:
            losses[step] = estimate_loss(model, splits, config)
            train_loss, val_loss = losses[step].values()
            if math.isnan(val_loss):
                raise ValueError(f"step {step}: the loss is not a number; lower --learning_rate")
            # With pairs, val asks for facts that are not in train: its loss rises while the model
            # learns those in train, so the latest weights count as the best.
            if val_loss == min(r["val"] for r in losses.values()) or config.data.endswith(".jsonl"):
                run["best"] = {name: p.clone() for name, p in model.state_dict().items()}
            text = " ".join(sample(model, tokenizer, 60).split())
            tqdm.write(f"step {step:6,d}   train {train_loss:.4f}   val {val_loss:.4f}   {text}")
        if (step in due or stopping) and RANK == 0:
            averages = [optimizer.state_dict()["state"] for optimizer in optimizers]
            run.update(step=step, model=model.state_dict(), optimizer=averages)
            save_checkpoint(config.out, run)
        if stopping or step == config.max_iters:
            break
        batches = list(draw_batches(splits["train"], config, step))
        loss = training_step(fast, optimizers, batches, config, step)
        if step % 10 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    curve = [row["val"] for row in losses.values()]
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * (loss - min(curve)) / max(curve))] for loss in curve)
    tqdm.write(f"losses  last {curve[-1]:.4f}, best {min(curve):.4f}   {bars}")
    if config.device == "cuda":
        tqdm.write(f"memory  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU at most")
    tqdm.write(sample(model, tokenizer, 500))
    tqdm.write(f'\nsaved; the same command carries on; chat: python chat.py --model "{config.out}"')
    return model.eval()


def tune(config):
    """Times training with different settings at an unchanged total batch (lessons: auto-tuning and
    efficiency testing, since only measuring tells what is faster)."""
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
            batches = list(draw_batches(splits["train"], trial, step=0))
            # item() waits for the GPU. The fastest of six steps counts: the first ones warm up.
            work = lambda: training_step(fast, optimizers, batches, trial, step=0).item()
            rates[flags] = total * config.block_size / min(timeit.repeat(work, number=1, repeat=6))
            print(f"{rates[flags]:12,.0f} characters a second   {flags}")
        except (RuntimeError, MemoryError) as error:
            print(f"failed: {error!r:.60}   {flags}")
    print(f"fastest: python gpt.py {max(rates, key=rates.get)}")


# -------------------------------- the command line ----------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake is one line on stderr and exit status 2. (argparse calls this as well.)"""
        self.exit(2, f"{self.prog}: {printable(' '.join(str(message).split()))}\n")


def main(argv=None):
    """Each field of Config is a flag; --help shows them as they stand above."""
    settings = inspect.getsource(Config).partition("\n\n")[0]  # its text up to the empty line
    parser = Parser(description=settings, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)  # absent if not given
    for field in fields(Config)[:-1]:  # the last is compile
        parser.add_argument(f"--{field.name}", type=field.type)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)  # and --no-compile
    parser.add_argument("--tune", action="store_true", help="find the fastest settings instead")
    flags = vars(parser.parse_args(argv))
    work = tune if flags.pop("tune", False) else train
    on_signal = ask_to_stop if work is train and WORLD == 1 else signal.SIG_DFL  # ends at once
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if WORLD > 1:  # they talk to each other, through gloo between CPUs and nccl between GPUs
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backends)
        atexit.register(torch.distributed.destroy_process_group)
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # process 0 alone prints
    try:
        config = choose_settings(flags)
        work(config)
    except (ValueError, OSError) as error:
        parser.error(error)
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith("torch._"):  # a part of torch.compile
            parser.error(f"torch.compile failed, so try --no-compile: {error!s:.200}")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            new = f"--batch_size {config.batch_size // 2 or 1} --grad_accum {2 * config.grad_accum}"
            parser.error(f"out of memory: try {new}, then a smaller block_size, n_embd or n_layer")
        raise


if __name__ == "__main__":
    # A terminal without UTF-8 shows "?" and does not stop the run; a log file grows line by line.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main()
