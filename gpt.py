"""A character-level GPT in one file: it reads text character by character and learns to write more.

    python gpt.py                    train on the documentation that Python carries
    python gpt.py --data book.txt    train on any text; the same command again carries on
    python gpt.py --help             every setting below is a flag of the same name
    python chat.py                   talk to the model

GPT stands for generative pre-trained transformer: it generates text, was trained on much of it
beforehand, and its parts are those of the Transformer of 2017. What it writes should read like the
text that it was trained on, without being a copy. The file follows the freeCodeCamp course "Create
a Large Language Model from Scratch with Python". Part one is the lesson: what a GPT is and how it
learns. Part two keeps a run safe and makes it fast; a first reading may skip it. Letters in
comments are sizes, of things that are explained where they first appear:
    B  batch: texts worked on side by side      H  attention heads
    T  time: characters in each text            D  head size, C / H
    C  channels: numbers for each character     V  vocabulary: different characters
"""
import argparse, atexit, codecs, inspect, json, math, os, re, shlex, shutil, signal, sys, time
import warnings, zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
from tqdm import tqdm


# ================================ Part one: the lesson ==========================================
@dataclass
class Config:
    """The settings of a run, or hyperparameters: people choose these, while the parameters are what
    the model learns. From the lines below, dataclass makes an __init__, so that Config(n_layer=2)
    changes one of them. ValueError names a setting that cannot work."""
    data: str = ""                # text, folder of texts, .jsonl of pairs, or prepared folder
    out: str = ""                 # checkpoint, the file of a model; "" is named after the data
    init_from: str = ""           # checkpoint whose weights a new run starts from (fine-tuning)
    batch_size: int = 32          # texts worked on at once: B
    block_size: int = 128         # characters that the model sees at most: T
    grad_accum: int = 1           # batches that make up one training step
    max_iters: int = 900          # training steps in all
    n_embd: int = 128             # numbers that describe each character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # layers (class Block) on top of each other; 0: no attention
    dropout: float = 0.1          # share of numbers turned off in training (see FeedForward)
    optimizer: str = "adamw"      # adamw or muon, which move the weights (see make_optimizers)
    learning_rate: float = 3e-3   # size of a training step at its largest
    weight_decay: float = 0.02    # how strongly weights are pulled to 0, against learning by heart
    warmup_iters: int = 100       # steps in which the learning rate climbs; at most half of a run
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
    long. With words it would be the reverse; subwords (byte-pair encoding, BPE, as in GPT-2) lie
    in between. The course has
        char_to_id = {char: id for id, char in enumerate(chars)}
        id_to_char = {id: char for id, char in enumerate(chars)}
    Here chars[id] is the character of an id. The other way is an array, since numpy looks up a
    whole text in an array at once: code_to_id[104] is the id of "h", as 104 is the code of "h",
    its number in Unicode.
    ValueError if there are more characters than 2 bytes can number."""

    def __init__(self, chars):
        self.chars = "".join(sorted(set(chars) | {END, UNK}))
        self.vocab_size = len(self.chars)
        if self.vocab_size > 2**16:
            raise ValueError(f"{self.vocab_size:,} different characters are too many: the limit is "
                             f"{2**16:,} (prepare_owt.py --min_count makes rare ones unknown)")
        self.end = self.chars.index(END)
        self.unk = self.chars.index(UNK)
        # Every code of Unicode first gets UNK's id, then those of the vocabulary get their own.
        self.code_to_id = np.full(sys.maxunicode + 1, self.unk, np.uint16)
        codes = [ord(char) for char in self.chars]
        self.code_to_id[codes] = np.arange(self.vocab_size)

    def encode(self, text):
        """str -> ids, 1-D uint16. Characters outside the vocabulary become UNK; it never fails."""
        # UTF-32 writes each character as its code, in 4 bytes, and frombuffer reads such bytes as
        # numbers: "hi" is 104, 105. (With surrogatepass, halves of characters, as broken texts may
        # have them, do not make it fail.)
        utf32 = text.encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(utf32, np.uint32)
        return self.code_to_id[codes]

    def decode(self, ids):
        """Ids, a list or an integer array -> str."""
        return "".join(self.chars[id] for id in ids)


def load_data(config, chars=""):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer); 1-D uint16 ids.
    Without a name, it is the documentation that every CPython carries, half a million characters.
    The first 90 % are for training, the rest for validation: an exam needs questions that the
    homework did not have, or learning by heart would look like learning. A corpus larger than
    memory is a folder that prepare_owt.py wrote, and its ids stay on the disk until they are used.
    chars: the vocabulary of a model to start from, if any.
    ValueError if the corpus is too short or damaged, OSError if it cannot be read."""
    if kind_of(config.data) == "prepared folder":                # rare: a first reading may skip it
        splits, tokenizer = open_prepared(config.data)           # in part two
    else:
        texts = read_documents(config.data)                      # in part two: a list of them
        text = "".join(document + END for document in texts)
        del texts                                                # they may take much memory
        tokenizer = CharTokenizer(chars or text)
        ids = tokenizer.encode(text)
        report_unknown(text, ids, tokenizer)                     # in part two
        cut = int(0.9 * len(ids))
        if kind_of(config.data) == "pairs":                      # prompts with their answers:
            cut = text.rfind(END, 0, cut) + 1                    # back to where a pair ends
        splits = {"train": ids[:cut], "val": ids[cut:]}
    fit_blocks(splits, config)                                   # in part two: is it long enough?
    return splits, tokenizer


def get_batch(data, config, starts):
    """Blocks of text, and what follows each character in them: (x, y), int64 (B, T).
    A block of T characters holds T examples, one for each beginning: after "h" comes "e", after
    "he" comes "l". A batch is B blocks, stacked, since a GPU works on all of them at once. They
    start at random places, so that each batch is a fair sample of the whole text.
    Both are tensors: arrays of numbers with a shape, a type (dtype) and a device that holds them.
    Ids are int64, which the loss asks for. Types must agree: an error about Long and Float says
    that integers met decimal numbers. If shapes do not fit, print(x.shape) is the first thing to
    try.
    starts: B places, an array."""
    # With T = 2, starts 5 and 9 read the places 5, 6, 7 and 9, 10, 11: a column of starts plus the
    # row 0, 1, 2 makes this table, with a row for each text.
    offsets = np.arange(config.block_size + 1)
    places = starts[:, None] + offsets          # (B, 1) + (T + 1,) -> (B, T + 1)
    ids = data[places].astype(np.int64)         # the id at each place; only these are read
    blocks = torch.from_numpy(ids)
    if config.device == "cuda":                 # pinned memory: the GPU fetches it by itself, while
        blocks = blocks.pin_memory()            # Python goes on
    blocks = blocks.to(config.device, non_blocking=True)
    return blocks[:, :-1], blocks[:, 1:]


# -------------------------------- model ---------------------------------------------------------
class Head(nn.Module):
    """Self-attention: how a character looks at those before it (Vaswani et al. 2017).
    Each character comes with three lists of D numbers. Its query says what it is looking for, its
    key what it contains, its value what it passes on. MultiHeadAttention, the next class, makes
    them from what is known of the character, with weights that are learned. The dot product of a
    query and a key (multiply number by number, then add up) is a score for how well the two fit.
    The scores become shares, and each character takes that mixture of the values. A recurrent
    network carries the past along step by step; here all positions look back at once, which is
    what GPUs are good at.
    q, k, v: (B, H, T, D), the queries, keys and values of all texts and heads, in one call. The
    course has a module for each head: the same numbers, more slowly."""

    def written_out(self, q, k, v):
        """What forward computes, step by step, for reading and for trying out with print."""
        T, D = q.shape[-2:]
        # In a matrix product, @, each number is the dot product of a row and a column, so the inner
        # sizes must agree: (T, D) @ (D, T) -> (T, T), a score for each query and key, in each text
        # and head.
        scores = q @ k.transpose(-2, -1)                          # (B, H, T, T)
        # A sum of D products grows like sqrt(D), as plus and minus partly cancel (100 coin tosses,
        # +1 or -1 each, sum up to some 10, not 100). With large scores softmax picks one winner,
        # and whatever the others have to say is lost.
        scores = scores / math.sqrt(D)
        # Position t sees positions 0 to t, the lower triangle: the rest is the future, which the
        # model is to predict. (The course keeps this constant mask in a register_buffer, a tensor
        # that moves to the GPU with the model but is not learned.)
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
        # Softmax: e ** score over the sum of the row. These are shares of 1; e ** -inf is 0.
        shares = scores.softmax(dim=-1)                           # (B, H, T, T)
        return shares @ v                                         # (B, H, T, D)

    def forward(self, q, k, v):
        # The same in one call, which on most devices never stores the T x T scores. is_causal is
        # the mask. (In generation, q is often the newest character's alone, while k and v are those
        # of all characters so far: it may see them all.)
        several = q.shape[-2] > 1
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=several)


class MultiHeadAttention(nn.Module):
    """Several heads read the same text at the same time, like several readers of one book, each
    with questions of its own. Their findings are joined and mixed. (B, T, C) -> (B, T, C).
    An nn.Linear is Wx + b: a matrix product with learned weights W, and a learned bias b. An
    nn.Module finds the parameters inside it, so that the optimizer can be handed all of them,
    .to(device) moves all of them and state_dict() saves all of them.
    ValueError if the heads cannot share C evenly."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be divisible by n_head {config.n_head}")
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # as in the course
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H = self.n_head
        D = C // H
        # One product makes the queries, keys and values of all heads, side by side.
        q, k, v = self.qkv(x).split(C, dim=2)        # (B, T, 3 C) -> (B, T, C) each
        # C is cut into H pieces of D; then T and H change places: each head gets a (T, D). (One
        # view to (B, H, T, D) would keep the order in memory, and so mix up the characters.)
        q = q.view(B, T, H, D).transpose(1, 2)       # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)
        v = v.view(B, T, H, D).transpose(1, 2)
        # When the model writes, x is first the prompt, then only the newest character, and T is 1.
        # The keys and values of those before it were computed already, and do not change (see
        # GPT.stream): cache has kept them. It is {module: (keys, values)}: each layer has its own.
        if cache is not None:
            if self in cache:
                old_k, old_v = cache[self]
                k = torch.cat((old_k, k), dim=2)
                v = torch.cat((old_v, v), dim=2)
            cache[self] = (k, v)
        x = self.head(q, k, v)                       # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)       # heads side by side again
        return self.dropout(self.proj(x))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear: each character thinks about what it has seen. (B, T, C) -> (B, T, C),
    with 4 C in between, as is custom. A Sequential runs its modules in turn: that is its forward.
    ReLU makes negative numbers 0; without it, two linear maps would be one, since A(Bx) = (AB)x.
    (Sigmoid and tanh bend too, but are flat for large inputs, where little can be learned.) Dropout
    turns off random activations (numbers between layers) in training: none can rely on another."""

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd),
                         nn.ReLU(),
                         nn.Linear(4 * config.n_embd, config.n_embd),
                         nn.Dropout(config.dropout))


class Block(nn.Module):
    """Attention, then feed-forward: one layer of the model. (B, T, C) -> (B, T, C).
    Each result is added to its input. This is called a residual: what was known is kept, and each
    layer only adds to it. (Gradients, by which a model learns, pass through a sum unchanged, so the
    first layers learn as soon as the last.) A norm follows each sum: it brings each character's C
    numbers to mean 0 and variance 1, so that they keep one scale from layer to layer. Then it
    multiplies each by a number and adds another; these are learned, in case other scales serve
    better. This order is post-norm, as in the course. GPT-2 uses pre-norm, x + sublayer(norm(x)),
    which is easier to train; with post-norm, gradients are large at first, so training has to begin
    with small steps (see learning_rate).
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
    """The model: for each character of a text, it scores each character that could come next.
    An embedding is a table with a row of C numbers for each id: what the model knows of that
    character. Attention compares characters, but does not see where they stand, so each position
    has a row as well. All these numbers start at random and are learned. (The first Transformer
    computed those of its positions, with sines.)"""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        # A ModuleList only holds its modules; forward runs them.
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)  # as in the course, though each block ends with one
        self.lm_head = nn.Linear(config.n_embd, vocab_size)
        # Matrices start at random, N(0, 0.02): normal, with mean 0 and spread 0.02. They differ, so
        # that neurons, the outputs of a layer, learn different things. They are small, so that
        # signals do not explode on their way; residuals and norms keep them from vanishing.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            # and the scales of norms are 1, as PyTorch makes them

    def forward(self, index, targets=None, cache=None, start=0):
        """index, targets: int64 (B, T), T <= block_size -> (logits (B, T, V), loss or None).
        Logits are scores; softmax makes shares of them. The loss is the cross-entropy, or negative
        log likelihood: the mean of -ln(share of the character that came). An untrained model's
        scores are all near 0, so it guesses about evenly, 1/V for each, which costs ln V: 4.38 for
        80 characters. (Mean squared error is for regression, which predicts a quantity.)
        cache and start are for generation: see stream. ValueError if a text is too long."""
        end = start + index.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} characters do not fit: block_size is {self.config.block_size}")
        x = self.tokens(index) + self.positions.weight[start:end]  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x, cache)
        logits = self.lm_head(self.norm(x))                        # (B, T, V)
        if targets is None:
            return logits, None
        scores = logits.flatten(0, 1).float()                      # (B*T, V), float32 in any case
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        return logits, loss

    @torch.inference_mode()  # keeps nothing that only learning needs
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1, by one new character at a time, (B, 1): yield
        hands it out, and goes on from there when the next one is asked for.
        temperature and top_k: see draw.
        cache keeps the keys and values of what was read, so that only the newest character has to
        be read. They stay right, because each character sees only those before it, in every layer:
        what comes later changes nothing in what an earlier one knows.
        The model sees block_size characters. When there is one too many, only the last half is
        kept, and its first character now stands at position 0. A key is made from a character and
        its position, so those in the cache are wrong now: the half is read again, into an empty
        cache. That happens once in half a block, however long the text is."""
        index = index[:, -self.config.block_size:]              # crop to what the model can see
        cache = {}
        start = 0                                               # position of the first one to read
        for _ in range(max_new_tokens):
            logits, _ = self(index[:, start:], cache=cache, start=start)
            drawn = draw(logits[:, -1], temperature, top_k)     # from the last position's scores
            yield drawn
            start = index.shape[1]                              # "abc": 3, where the 4th will be
            index = torch.cat((index, drawn), dim=1)
            if index.shape[1] > self.config.block_size:         # full: go on with its last half
                index = index[:, -max(1, self.config.block_size // 2):]
                cache = {}
                start = 0

    def generate(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """index (B, T) with its continuation, (B, T + max_new_tokens). See stream."""
        drawn = list(self.stream(index, max_new_tokens, temperature, top_k))
        return torch.cat([index, *drawn], dim=1)


def draw(logits, temperature=1.0, top_k=None):
    """Scores (B, V) -> the id of one character for each text, int64 (B, 1).
    A temperature below 1 makes likely characters likelier, one above 1 evens them out, and 0 takes
    the likeliest. top_k allows only the k likeliest. Of two that are equally likely, the first in
    the vocabulary is preferred."""
    if temperature < 1e-6:  # dividing by it would fail
        return logits.argmax(dim=-1, keepdim=True)
    shares = (logits.float() / temperature).softmax(dim=-1)
    if top_k:
        ids = shares.argsort(dim=-1, descending=True, stable=True)
        others = ids[:, top_k:]                                 # all after the k-th
        shares = shares.scatter(-1, others, 0.0)                # their shares become 0
    return torch.multinomial(shares, 1)  # each is drawn by its share, as with a loaded die


# -------------------------------- learning ------------------------------------------------------
def autocast(config):
    """With dtype bfloat16, matrix products use 16 bits, faster where the processor has instructions
    for them. What needs more digits (norm, softmax, loss) stays float32: PyTorch has a list."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def estimate_loss(model, splits, config):
    """Mean loss of each split, over eval_iters batches: {"train": float, "val": float}.
    The batches are spread evenly over the split and the same every time, so that two evaluations
    can be compared. eval() turns dropout off, train() on again; no_grad() saves work that only
    learning needs. Overfitting is when train keeps falling while val rises: it learns by heart.
    More text, more dropout, a smaller model or fewer steps help, and the weights with the lowest
    val are kept."""
    model.eval()
    means = {}
    for name, data in splits.items():
        last = len(data) - config.block_size - 1
        # eval_iters * B places from the first to the last, then B of them for each batch
        places = np.linspace(0, last, config.eval_iters * config.batch_size, dtype=np.int64)
        losses = []
        for starts in np.split(places, config.eval_iters):
            x, y = get_batch(data, config, starts)
            with autocast(config):
                _, loss = model(x, y)
            losses.append(loss.item())
        means[name] = sum(losses) / len(losses)
    model.train()
    return means


def make_optimizers(model, config):
    """A list, [AdamW] or [AdamW, Muon]: what moves the weights.
    A weight's gradient says how the loss changes if that weight grows a little. Gradient descent
    moves it the other way. Adam (Kingma and Ba 2014) keeps two running averages for each weight:
        average = 0.9 * average + 0.1 * gradient            (momentum: it evens out the noise)
        square = 0.99 * square + 0.01 * gradient ** 2       (as in RMSprop)
        weight = weight - learning_rate * average / sqrt(square)
    Gradients that are always 5, or always 0.005, give 5 / 5 or 0.005 / 0.005: so all weights move
    at a similar pace. (Left out: a correction while the averages are young, and a tiny number that
    keeps the division from failing.) 0.9 and 0.99 are its betas. The W (Loshchilov and Hutter 2017)
    is weight decay, which is separate from this: matrices also shrink a little each time, since it
    takes large weights to learn single examples by heart. fused: one call moves all weights."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms are not shrunk
    muon = []
    if config.optimizer == "muon":  # an option, in part two: another optimizer for the blocks
        matrices, muon = make_muon(model, config)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.99), fused=True)
    return [adamw, *muon]


def learning_rate(step, config):
    """How far a step of gradient descent goes: too far overshoots, too short crawls. It climbs
    while the optimizer's averages are still guesses, then falls to a tenth, to settle: the cosine
    goes from 1 to -1, and with it the factor from 1 to 0.1. To find a good rate, try a few, each 3
    times the last, for some hundred steps, and look at the losses."""
    warmup = min(config.warmup_iters, config.max_iters // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (config.max_iters - warmup)  # from 0 to 1
    factor = 0.55 + 0.45 * math.cos(math.pi * progress)
    return config.learning_rate * factor


def training_step(model, optimizers, batches, config, step):
    """One step of gradient descent: forward, backward, step. Returns the mean loss, a tensor.
    backward finds the gradients of all weights in one pass, from the loss back to the first layer,
    by the chain rule, and leaves each in weight.grad, where the optimizer finds it.
    batches: [(seed for dropout, x, y), ...]. More than one is gradient accumulation: their
    gradients add up to those of one large batch, too large for the memory."""
    total = 0.0
    for seed, x, y in batches:
        torch.manual_seed(seed)  # so that the step can be repeated, with the same dropout
        with autocast(config):
            _, loss = model(x, y)
        loss = loss / len(batches)  # the batches' losses add up to their mean
        loss.backward()
        total += loss.detach()  # the number alone, without what backward needs
    average_gradients(model)  # in part two, for several processes; alone, it does nothing
    # One odd batch must not throw the weights far. All gradients together are one long vector; if
    # its length is above grad_clip, it is shortened to that.
    if config.grad_clip > 0:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    rate = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # those of make_optimizers
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()  # backward adds to the gradients that are there: none for the next
    return total


def learn(model, splits, config):
    """Training, whole: again and again a batch and a step, and now and then a look at the losses.
    python gpt.py runs train, in part two: this loop, with what a long run needs besides."""
    optimizers = make_optimizers(model, config)
    data = splits["train"]
    for step in range(config.max_iters):
        if step % config.eval_interval == 0:
            print(step, estimate_loss(model, splits, config))
        starts = np.random.randint(len(data) - config.block_size, size=config.batch_size)
        x, y = get_batch(data, config, starts)
        training_step(model, optimizers, [(step, x, y)], config, step)


# That is all that a GPT is, and how it learns. A first reading may stop here.
# ================================ Part two: the craft ===========================================
# It reads what users really have, keeps a run safe and makes it fast. Each function says first
# which trouble it is there for.

# One process can use one GPU. torchrun, PyTorch's starter, runs WORLD processes that train one
# model together, on one machine or several, and gives each a number, its RANK. A process started
# without it is alone: RANK is 0 and WORLD is 1. LOCAL_RANK is a process's number on its machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# -------------------------------- reading texts -------------------------------------------------
def kind_of(path):
    """What --data names. All that reads a corpus, or speaks of it, asks here."""
    if not path:
        return "Python's documentation"
    if Path(path, "vocab.json").exists():
        return "prepared folder"
    if os.path.isdir(path):
        return "folder of texts"
    if path.lower().endswith((".jsonl", ".ndjson")):
        return "pairs"
    return "text"


def encoding_of(data):
    """The encoding of a text that begins with these bytes: UTF-8, or UTF-16 if it begins with that
    one's byte-order mark, as Windows writes it. Python drops the mark when it decodes."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def clean(text):
    """Line ends differ between systems, and a model would learn them as characters: all become
    "\\n". An END inside a text becomes UNK, since it means that the text is over."""
    if "\r" in text:
        for line_end in ("\r\r\n", "\r\n", "\r"):
            text = text.replace(line_end, "\n")
    return text.replace(END, UNK)


def read_text(path):
    """A file that is not text would be learned all the same, as noise. ValueError says where bytes
    are neither UTF-8 nor UTF-16, or where a NUL (which no text has) shows that this is no text."""
    data = Path(path).read_bytes()
    advice = "save it as UTF-8, or use prepare_owt.py for an archive"
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        raise ValueError(f"{path}, line {line:,}: this is no text in {error.encoding}; {advice}")
    if "\0" in text:
        before, _, _ = text.partition("\0")
        line = before.count("\n") + 1
        raise ValueError(f"{path}, line {line:,}: a NUL, so this is no text; {advice}")
    return clean(text)


def read_pairs(path):
    """A list of prompts with their answers, each pair joined by a line end: from a file that has
    {"prompt": ..., "completion": ...} on each line. ValueError names a line that has not."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: this is no JSON: {line[:60]}")
        if not isinstance(pair, dict):
            raise ValueError(f"{where}: no object with prompt and completion: {line[:60]}")
        texts = [pair.get("prompt"), pair.get("completion")]
        for text in texts:
            if not isinstance(text, str) or "\0" in text:
                raise ValueError(f"{where}: prompt and completion must be texts; the keys here are "
                                 f"{', '.join(pair)}")
        pairs.append(clean("\n".join(texts)))
    return pairs


def read_folder(folder):
    """A list of the texts in a folder and in its folders; what is not read is said."""
    texts = []
    others = 0
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path.name.startswith("._"):  # macOS writes ._ files beside others
            continue
        if path.suffix.lower() == ".txt":
            texts.append(read_text(path))
        else:
            others += 1
    if not texts:
        raise ValueError(f"{folder}: neither .txt files nor the vocab.json of prepare_owt.py")
    if others:
        print(f"{folder}: {others:,} files do not end in .txt and are not read")
    return texts


def read_documents(path):
    """A list of texts: the whole of a text file, the texts of a folder, a .jsonl's pairs."""
    kind = kind_of(path)
    if kind == "Python's documentation":
        from pydoc_data.topics import topics
        return [clean(text) for text in topics.values()]
    if kind == "folder of texts":
        return read_folder(path)
    if kind == "pairs":
        return read_pairs(path)
    return [read_text(path)]


def open_prepared(folder):
    """The folder of prepare_owt.py -> (splits, tokenizer). An array of np.memmap looks like any
    other, but reads from its file only what is used, so that a corpus may be larger than memory.
    ValueError if the files do not belong together: if one was cut, or comes from another folder,
    a run would learn nonsense. (A checksum is a number that changes when a file does.)"""
    folder = Path(folder)
    vocabulary = (folder / "vocab.json").read_bytes()
    try:
        corpus = json.loads((folder / "corpus.json").read_bytes())
        fits = corpus["checksum"] == zlib.crc32(vocabulary)
        for name in ("train", "val"):
            size = (folder / f"{name}.bin").stat().st_size
            fits = fits and size == 2 * corpus[name]  # 2 bytes for each id
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise ValueError(f"{folder}: its files are damaged or do not belong together; run "
                         "prepare_owt.py again")
    splits = {}
    for name in ("train", "val"):
        if corpus[name] > 0:  # a file of nothing cannot be mapped
            splits[name] = np.memmap(folder / f"{name}.bin", np.uint16, "r")  # r: read only
        else:
            splits[name] = np.zeros(0, np.uint16)
    return splits, CharTokenizer(json.loads(vocabulary))


def report_unknown(text, ids, tokenizer):
    """A model that was trained on other characters reads all new ones as UNK, and would never learn
    to tell them apart: so they are named."""
    is_unknown = ids == tokenizer.unk
    if not is_unknown.any():
        return
    unknown = sorted(set(text) - set(tokenizer.chars))
    if unknown:
        some = printable(" ".join(unknown[:20]))
        print(f"unknown {np.mean(is_unknown):.1%} of the text are characters that this model never "
              f"saw: {some}")


def load_corpus(config, chars=""):
    """load_data, for which a text may be too large: ValueError then says what helps."""
    try:
        return load_data(config, chars)
    except MemoryError:
        raise ValueError(f"{config.data} does not fit in memory: prepare_owt.py makes a folder of "
                         "it that is read in place")


def fit_blocks(splits, config):
    """A split must be longer than a block. Where there are few pairs, they are repeated until it
    is: for a block of 128, there are 3 copies of 50 ids. ValueError for any other short text."""
    for name, ids in splits.items():
        if kind_of(config.data) == "pairs" and len(ids) > 0:
            copies = 1 + config.block_size // len(ids)
            splits[name] = np.tile(ids, copies)
        elif len(ids) < 2:
            raise ValueError(f"{config.data}: too short for a {name} split")
        elif len(ids) <= config.block_size:
            raise ValueError(f"{config.data}: the {name} split has {len(ids):,} characters, which "
                             f"is too short for block_size {config.block_size}: try "
                             f"--block_size {len(ids) - 1}")


# -------------------------------- settings ------------------------------------------------------
# What a model is made of, which stays as it is for as long as the model lives.
ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer")
# What belongs to a machine: a checkpoint may come from another one, so it does not decide these.
OF_THE_MACHINE = ("out", "device", "dtype", "compile")
CHOICES = {"optimizer": ("adamw", "muon"),
           "device": ("cpu", "cuda", "mps"),
           "dtype": ("float32", "bfloat16")}
MAY_BE_ZERO = ("max_iters", "n_layer", "warmup_iters", "seed")
HIGHEST = {"dropout": 0.99, "n_layer": 1000}


def check(config):
    """A mistake in a setting is better found now than after an hour: ValueError names it."""
    for field in fields(config):  # a field of the dataclass has a name, a type and more
        name = field.name
        value = getattr(config, name)
        if field.type is float and type(value) is int:
            value = float(value)  # 1 will do for 1.0
        if type(value) is not field.type:
            raise ValueError(f"{name} must be of type {field.type.__name__}, not {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            choices = " or ".join(CHOICES[name])
            raise ValueError(f"{name} must be {choices}, not {value!r}")
        if field.type in (int, float):
            lowest = 1
            if field.type is float or name in MAY_BE_ZERO:
                lowest = 0
            highest = HIGHEST.get(name, 2**31)
            if not lowest <= value <= highest:  # nan, "not a number", is in no range
                raise ValueError(f"{name} must be from {lowest} to {highest}, not {value}")


def has_bfloat16():
    """Whether the GPU computes in it. What only emulates it, in several steps, is slow."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def defaults_for(device):
    """A GPU can work on a larger model than a CPU, for which the values in Config are right."""
    if device != "cuda":
        return {}
    settings = dict(batch_size=64, block_size=256, n_embd=384, n_head=8, n_layer=8, dropout=0.3,
                    weight_decay=0.5, learning_rate=2e-3, warmup_iters=200, max_iters=600,
                    eval_interval=100, eval_iters=20)
    if torch.cuda.is_available() and has_bfloat16():
        settings["dtype"] = "bfloat16"
    # What torch.compile writes for a GPU has to be built by a C compiler, which Windows rarely has.
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    found = any(shutil.which(name) for name in compilers)
    settings["compile"] = sys.platform == "linux" and found
    return settings


def choose_settings(given):
    """A setting that was given beats the checkpoint, the checkpoint beats what suits the device,
    and that beats Config. Takes {name: value} and returns (config, saved, stamp). saved is what the
    checkpoint holds, or {}. stamp is None if the run is new. If the run carries on with a file, it
    is that file's: with it, save_checkpoint will notice if another run has written the file."""
    config = Config(**given)  # a first one, to know which device and files are meant
    # book.txt gives book.pkl. abspath finds a name for "." too; a link is named as it was typed.
    out = config.out or Path(os.path.abspath(config.data or "model")).stem + ".pkl"
    stamp, saved = find_checkpoint(out, config.init_from)
    settings = defaults_for(config.device)
    if saved:
        handed_down = ARCHITECTURE  # all that a run with init_from takes over
        if stamp:
            handed_down = set(saved["config"]) - set(OF_THE_MACHINE)
        for name in handed_down:
            settings[name] = saved["config"][name]
    settings.update(given)
    settings["out"] = out
    return Config(**settings), saved, stamp


def refuse_contradictions(given, config, saved, stamp):
    """A trained model must not be lost to a flag that does not fit. And where a run is finished, no
    step is left to use another setting: nobody should believe that it made no difference.
    ValueError names the setting."""
    path = config.out if stamp else config.init_from
    fixed = ARCHITECTURE
    if stamp:
        fixed = ARCHITECTURE + ("optimizer", "seed", "init_from")
    finished = stamp and saved["step"] >= config.max_iters
    for name, value in given.items():
        old = saved["config"].get(name, value)
        if value == old:
            continue
        words = f"{path} was trained with {name} {old!r}, not {value!r}"
        if name in fixed:
            raise ValueError(f"{words}: leave it out, or name another --out")
        if finished and name not in ("data", "out", "device", "max_iters"):
            raise ValueError(f"{words}, and is finished at step {saved['step']}: raise --max_iters "
                             "or name another --out")


# -------------------------------- checkpoints ---------------------------------------------------
def stamp_of(path):
    """Two runs may be started on one file by mistake. The stamp tells whether a file is still the
    one that this run left there: it changes with each save. None if there is no file."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns  # the file's number on the disk, and when it was made


def save_checkpoint(path, checkpoint, stamp):
    """Writes a dict and returns the new stamp. Killed at any instant, it leaves the old file or the
    new one, whole: it writes beside the file, and only then renames. stamp: what stamp_of(path) was
    when this run last read or wrote the file. OSError if it could not be saved, or if another run
    has written the file since; then the file stays as it is."""
    path = Path(os.path.realpath(path))  # where a link points to, so that the link stays
    remove_leftovers(path)
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # model.pkl.4711.tmp in process 4711
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()             # from Python to the system
            os.fsync(file.fileno())  # from the system to the disk, before the old file goes
        if stamp_of(path) != stamp:
            raise OSError("another run has written this file, so name another --out")
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not saved, the file is as it was: {error}")
    return stamp_of(path)


def remove_leftovers(path):
    """What was killed while it wrote leaves a temporary file or folder, named after path and its
    process. Those whose process has ended are removed, where it can be told: on Linux, /proc has
    a folder for each process that runs."""
    if not os.path.exists("/proc/self"):
        return
    for old in path.parent.glob(f"{path.name}.*.tmp"):
        process = old.name.split(".")[-2]
        if not process.isdigit() or os.path.exists(f"/proc/{process}"):
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, onto the CPU -> dict.
    A pickle is Python's way to write objects to a file, and torch.save puts one into a zip, beside
    the tensors. Reading a pickle can run any code that its author liked. weights_only=True builds
    nothing but tensors and plain values, so that a stranger's file is safe.
    ValueError if the file is no checkpoint, or damaged; OSError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has several lines to say of some foreign files
            saved = torch.load(path, map_location="cpu", weights_only=True)
        check_checkpoint(saved)
    except OSError:
        raise  # the file could not be read at all
    except Exception as error:  # it could, but a foreign file can fail in any way
        if is_out_of_memory(error):
            raise ValueError(f"{path} does not fit in memory")
        raise ValueError(f"{path} is no checkpoint of gpt.py, or it is damaged")
    return saved


def check_checkpoint(saved):
    """A damaged file is better found now than in the middle of a run. Any error will do: what is
    missing is a KeyError, what is of the wrong kind a TypeError, and so on."""
    config = Config(**saved["config"])
    tokenizer = CharTokenizer(saved["chars"])
    if tokenizer.chars != saved["chars"]:
        raise ValueError("this is no vocabulary")
    with torch.device("meta"):  # there, tensors have shapes but no numbers, and cost nothing
        model = GPT(config, tokenizer.vocab_size)
    expected = shapes(model.state_dict())
    for weights in (saved["model"], saved["best"]):
        if shapes(weights) != expected:
            raise ValueError("these weights are another model's")
        for tensor in weights.values():
            if not tensor.isfinite().all():
                raise ValueError("these weights are no numbers")
    if type(saved["step"]) is not int or type(saved["optimizer"]) is not list:
        raise TypeError("step or optimizer")
    total = 0.0
    for step, losses in saved["losses"].items():
        total += step + losses["train"] + losses["val"]  # fails if one is missing or no number
    if "corpus" not in saved:
        raise KeyError("corpus")


def shapes(tensors):
    """{name: tensor} -> {name: shape}, to be compared. What is no tensor has no shape: None."""
    return {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}


def restore(optimizers, states):
    """Gives optimizers back their state: what they keep for each weight, as AdamW its two averages.
    PyTorch's load_state_dict would take the saved tensors without a look at their sizes, and its
    fused AdamW then reads and writes past the end of one that is too small. Hence three moves.
    First each optimizer takes a step with gradients of 0, at which it makes its own tensors, of the
    right sizes. Then sizes are compared. Then the saved numbers are copied into these tensors.
    (What that step did to the weights does not matter: they are loaded after this.)
    states: for each optimizer, {number of a weight: {name: tensor}}. Some error if they differ."""
    for optimizer, saved in zip(optimizers, states, strict=True):
        weights = []
        for group in optimizer.param_groups:
            weights.extend(group["params"])
        for number in saved:
            weights[number].grad = torch.zeros_like(weights[number])
        optimizer.step()
        optimizer.zero_grad()
        own = optimizer.state_dict()["state"]  # the very tensors that the optimizer uses
        for number in own:
            copy_state(saved[number], own[number])


def copy_state(saved, own):
    """Copies numbers from {name: tensor} to another such dict. ValueError if the shapes differ."""
    if shapes(saved) != shapes(own):
        raise ValueError("these are another optimizer's")
    for name in own:
        if torch.is_tensor(own[name]):
            own[name].copy_(saved[name])
        else:
            own[name] = saved[name]  # some optimizers count in plain numbers


def find_checkpoint(out, init_from):
    """A run that exists is carried on, never overwritten, so the file out is looked for first.
    Returns its stamp and what it holds; if there is none, None and what init_from holds, or {}."""
    found = [None, {}]
    if RANK == 0:
        stamp = stamp_of(out)
        path = out if stamp else init_from
        if path:
            found = [stamp, load_checkpoint(path)]
    if WORLD > 1:  # process 0 sends what it found, since the others may have other disks
        torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found


def load_model(path, device="cpu"):
    """A checkpoint -> (model with its best weights, in eval mode; tokenizer).
    ValueError if the file is no checkpoint or the device is not there, OSError if it is missing."""
    saved = load_checkpoint(path)
    settings = dict(saved["config"], device=device, dtype="float32")
    config = Config(**settings)
    prepare_device(config)
    tokenizer = CharTokenizer(saved["chars"])
    model = GPT(config, tokenizer.vocab_size)
    model.load_state_dict(saved["best"])
    return model.to(device).eval(), tokenizer


# -------------------------------- devices and processes -----------------------------------------
def join_processes():
    """Connects the processes of torchrun: through nccl between GPUs, gloo between CPUs. Process 0
    alone prints, or each line would come WORLD times."""
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    backends = "gloo"
    if torch.cuda.is_available():
        backends = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backends)
    atexit.register(torch.distributed.destroy_process_group)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def prepare_device(config):
    """A device that is missing is better named than met in a traceback: ValueError.
    A CPU has few fast cores, a GPU thousands of slow ones, which suits matrix products. CUDA is how
    NVIDIA's GPUs are programmed. .to(device) moves tensors; two that meet must be on one device."""
    if not getattr(torch, config.device).is_available():
        raise ValueError(f"device {config.device}: this machine, or its torch, has none")
    if config.device != "cuda":
        return
    if LOCAL_RANK >= torch.cuda.device_count():
        raise ValueError(f"process {LOCAL_RANK + 1} of this machine has no GPU: there are "
                         f"{torch.cuda.device_count()}, so lower --nproc_per_node")
    torch.cuda.set_device(LOCAL_RANK)
    if config.dtype == "bfloat16" and not has_bfloat16():
        raise ValueError("dtype bfloat16: this GPU has none, so leave the flag out")
    torch.set_float32_matmul_precision("high")  # TF32: fewer digits, far faster
    # Of PyTorch's ways to compute attention, cuDNN's first prepares itself for each new length T,
    # and in generation every character is a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)


def build(config, vocab_size):
    """Makes a new model on its device, and returns (model, optimizers, fast_model).
    torch.compile turns a model into faster code. fast_model is that code. It computes with the very
    same weights, so whoever trains it trains the model; and it is the model itself where nothing
    is compiled. On a GPU, a step is hundreds of small computations, and to start them one by one
    from Python takes longer than they do. Where a step is one batch, the compiler's mode
    reduce-overhead helps: it records them once, as a CUDA graph, and then starts all together. But
    a graph writes its results to the same place in memory each time, so that the gradients of a
    second batch would replace those of the first instead of being added to them."""
    prepare_device(config)
    torch.manual_seed(config.seed)
    model = GPT(config, vocab_size).to(config.device)
    if config.device == "cuda":
        make_exact(model)
    optimizers = make_optimizers(model, config)
    fast_model = model
    if config.compile:
        mode = "default"
        if config.device == "cuda" and config.grad_accum == 1:
            mode = "reduce-overhead"
        fast_model = torch.compile(model, mode=mode)
    return model, optimizers, fast_model


class OrderedLookup(torch.autograd.Function):
    """What nn.Embedding does, with gradients that do not depend on chance (see make_exact, below).
    A Function tells PyTorch how to compute something (forward) and its gradients (backward);
    context carries what the second needs from the first. index: ids, (B, T); weight: (V, C).
    Each place of a text used one row of weight, so the gradient of a row is the sum of those of its
    places. A product with a table of 0 and 1 is that sum, in a fixed order. With a vocabulary of 3
    and the ids 2, 0, 2, the table's rows are 0 1 0 (id 0 came second), 0 0 0 and 1 0 1."""

    @staticmethod
    def forward(context, index, weight):
        context.save_for_backward(index)
        context.vocab_size = len(weight)
        return nn.functional.embedding(index, weight)

    @staticmethod
    def backward(context, gradient):
        index, = context.saved_tensors
        rows = torch.arange(context.vocab_size, device=index.device)
        used = rows[:, None] == index.flatten()         # (V, B*T): did this place use this row?
        gradient = gradient.flatten(0, 1)               # (B*T, C)
        return None, used.to(gradient.dtype) @ gradient  # ids have no gradient, rows (V, C) do


def make_exact(model):
    """A GPU adds up numbers in the order in which its threads finish, so that the last bits of a
    sum differ from run to run. Here PyTorch is told to keep to one order, so that on a GPU, too, a
    run that carries on ends as if it had never been stopped. PyTorch's own way to do this for the
    gradients of the embedding takes a fifth of a step; OrderedLookup takes next to nothing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one order in matrix products
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only for finding errors
    model.tokens.forward = lambda index: OrderedLookup.apply(index, model.tokens.weight)


def make_muon(model, config):
    """Returns the matrices left to AdamW, and [Muon] for those of the blocks (Jordan 2024).
    Any matrix is a sum of simple ones, each a column times a row, and in gradients a few of these
    are far larger than the rest. Muon brings all of them to about the same size before it moves the
    weights, so that the rest is learned as well. match_rms_adamw makes its steps as large as
    AdamW's: one learning rate serves both."""
    inside = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = set(inside)
    outside = [p for p in model.parameters() if p.ndim >= 2 and p not in taken]
    group = {"params": inside}  # a model without blocks has none
    muon = torch.optim.Muon([group], weight_decay=config.weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    return outside, [muon]


def average_gradients(model):
    """Several processes that train one model have different batches, hence different gradients. All
    take the mean, as one vector, once a step: so all do the same step, and stay equal."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    vector = nn.utils.parameters_to_vector(gradients)
    torch.distributed.all_reduce(vector)  # now it is the sum over all processes
    nn.utils.vector_to_parameters(vector / WORLD, gradients)  # each gets its part of the mean


def draw_batches(data, config, step):
    """Yields (seed, x, y) for this process's batches of a step: of two processes, the first takes
    batches 0, 2, 4 and so on. All random numbers follow from the run's seed and the step. So a run
    that carries on draws what it would have drawn, and several processes draw what one would."""
    draw = np.random.default_rng((config.seed, step))
    size = (config.grad_accum, config.batch_size)
    starts = draw.integers(0, len(data) - config.block_size, size)
    for number in range(RANK, config.grad_accum, WORLD):
        # One number is made of three: a seed that no other batch has.
        sequence = np.random.SeedSequence((config.seed, step, number))
        seed = int(sequence.generate_state(1, np.uint64)[0])
        x, y = get_batch(data, config, starts[number])
        yield seed, x, y


def is_out_of_memory(error):
    """Whether an error says so, in the words of Python, PyTorch, CUDA, cuBLAS or Triton."""
    words = ("out of memory", "allocate", "ALLOC_FAILED", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def explain(error, config):
    """An error deep inside PyTorch that a user can do something about is raised again as one line
    that says what. Of any other error, nothing is known here."""
    if is_out_of_memory(error):
        advice = "a smaller block_size, n_embd or n_layer"
        if config.batch_size > 1:
            half = config.batch_size // 2
            advice = f"--batch_size {half} --grad_accum {2 * config.grad_accum}, then {advice}"
        raise MemoryError(f"out of memory: try {advice}") from error
    if type(error).__module__.startswith("torch._"):  # torch._dynamo, torch._inductor: the compiler
        message = " ".join(str(error).split())
        raise ValueError(f"torch.compile failed, try --no-compile: {message[:200]}") from error


# -------------------------------- what a run says -----------------------------------------------
def printable(text):
    """Text may move a terminal's cursor or worse. Control characters, those that turn the direction
    of writing (202a to 2069) and broken ones (d800 to dfff) become UNK; tab and line end stay."""
    control = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
    direction = r"\u202a-\u202e\u2066-\u2069"
    return re.sub(rf"[{control}{direction}\ud800-\udfff]", UNK, text)


def sample(model, tokenizer, length):
    """Some text that the model writes now. Training is not disturbed: it seeds every batch anew."""
    torch.manual_seed(model.config.seed)
    start = torch.tensor([[tokenizer.end]]).to(model.config.device)  # a text begins after an END
    model.eval()
    ids = model.generate(start, length, temperature=0.8)
    model.train()
    text = tokenizer.decode(ids[0, 1:].tolist())
    return printable(text.replace(END, "\n"))


def curve(losses):
    """A row of blocks for a list of losses: the lowest is ▁ and the highest █."""
    blocks = "▁▂▃▄▅▆▇█"
    low = min(losses)
    height = max(losses) - low
    row = ""
    for loss in losses:
        share = 0.0
        if height > 0:
            share = (loss - low) / height
        row += blocks[round(7 * share)]
    return row


def describe(splits, tokenizer, config):
    """The line about a corpus."""
    count = sum(len(ids) for ids in splits.values())
    line = f"{kind_of(config.data)}, {count:,} characters, {tokenizer.vocab_size:,} different ones"
    if kind_of(config.data) == "pairs":  # the model never sees the whole of one that is too long
        ids = np.concatenate(list(splits.values()))
        ends = np.flatnonzero(ids == tokenizer.end)
        lengths = np.diff(ends, prepend=-1)  # ENDs at 3 and 7: lengths 4 and 4
        line += f", {np.mean(lengths > config.block_size):.1%} of pairs longer than block_size"
    return line


def fingerprint(splits, tokenizer):
    """A run that carries on must have the text that it began with. What a text is recognized by:
    its lengths, and a checksum of 1,000 pieces of each split, evenly spread, since to read all of
    OpenWebText would take minutes. ValueError if ids are not in the vocabulary."""
    found = {}
    for name, ids in splits.items():
        checksum = 0
        for start in np.linspace(0, len(ids), 1000, endpoint=False, dtype=np.int64):
            piece = ids[start : start + 2**14]
            checksum = zlib.crc32(piece, checksum)
            if piece.max() >= tokenizer.vocab_size:
                raise ValueError(f"the {name} split has ids that are not in its vocabulary; run "
                                 "prepare_owt.py again")
        found[name] = [len(ids), checksum]
    return found


# -------------------------------- a run ---------------------------------------------------------
STOP = []  # the signals that have asked this program to end


def ask_to_stop(number, frame):
    """Python calls this at Ctrl-C and the like (see main): train ends its step, saves and stops."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # the default: at a second one, Python ends at once


class Run:
    """A run of training: what it is made of, and what it can do: evaluate, save, report."""

    def __init__(self, config, saved, stamp):
        self.config = config
        self.stamp = stamp  # of the file out: see stamp_of
        self.splits, self.tokenizer = load_corpus(config, saved.get("chars", ""))
        self.corpus = fingerprint(self.splits, self.tokenizer)
        self.model, self.optimizers, self.fast_model = build(config, self.tokenizer.vocab_size)
        self.step = 0     # how many steps it has done
        self.losses = {}  # {step: {"train": loss, "val": loss}}
        self.best = {}    # the best weights so far: {name: tensor}
        if stamp:
            self.carry_on(saved)
        elif saved:
            self.same_vocabulary(saved, config.init_from)
            self.model.load_state_dict(saved["best"])

    def same_vocabulary(self, saved, path):
        """An id must mean the same character to a model for as long as it lives."""
        if self.tokenizer.chars != saved["chars"]:
            raise ValueError(f"{self.config.data} was prepared with another vocabulary, so the "
                             f"model in {path} cannot read it")

    def carry_on(self, saved):
        """Takes over what the file out holds. ValueError if that was another text's."""
        out = self.config.out
        self.same_vocabulary(saved, out)
        if self.corpus != saved["corpus"]:
            raise ValueError(f"{out} was trained on another text, or {self.config.data} has "
                             f"changed since: name another --out, with --init_from {out} to start "
                             "from its weights")
        try:
            restore(self.optimizers, saved["optimizer"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{out} is damaged: what its optimizer kept does not fit the model")
        self.model.load_state_dict(saved["model"])
        self.step = saved["step"]
        self.losses = saved["losses"]
        self.best = saved["best"]

    def evaluation_is_due(self):
        """Every eval_interval steps and at the end, unless it was done before the run stopped."""
        regular = self.step % self.config.eval_interval == 0
        last = self.step == self.config.max_iters
        return (regular or last) and self.step not in self.losses

    def evaluate(self):
        """Estimates the losses and prints them, with a line that the model writes now."""
        losses = estimate_loss(self.model, self.splits, self.config)
        if not math.isfinite(losses["train"] + losses["val"]):
            raise ValueError(f"step {self.step}: the loss is no longer a number, so nothing was "
                             "saved: lower --learning_rate")
        self.losses[self.step] = losses
        text = sample(self.model, self.tokenizer, 60)
        line = " ".join(text.split())
        tqdm.write(f"step {self.step:6,d}   train {losses['train']:.4f}   "
                   f"val {losses['val']:.4f}   {line}")

    def check_weights(self):
        """Weights that are no longer numbers would spoil the file for good: ValueError."""
        for tensor in self.model.state_dict().values():
            if not tensor.isfinite().all():
                raise ValueError(f"step {self.step}: some weights are no longer numbers, so "
                                 "nothing was saved: lower --learning_rate")

    def best_step(self):
        """The step whose weights chat.py gets: the one with the lowest val. Step 0 does not count,
        as the model knew nothing then; if there is no other evaluation yet, it is the latest step.
        For pairs, it is always the latest: there, val asks for facts that are not in train, so it
        rises while the model learns."""
        vals = {step: losses["val"] for step, losses in self.losses.items() if step > 0}
        if kind_of(self.config.data) == "pairs" or not vals:
            return self.step
        return min(vals, key=vals.get)

    def save(self):
        """Saves all that the run needs to carry on."""
        self.check_weights()
        weights = self.model.state_dict()
        kept = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        if self.best_step() == self.step:
            # A copy, since the next step changes the weights in their place.
            self.best = {name: tensor.clone() for name, tensor in weights.items()}
        if RANK == 0:
            checkpoint = dict(config=asdict(self.config), chars=self.tokenizer.chars,
                              corpus=self.corpus, step=self.step, losses=self.losses,
                              model=weights, best=self.best, optimizer=kept)
            self.stamp = save_checkpoint(self.config.out, checkpoint, self.stamp)

    def introduce(self):
        """The first lines: what trains on what."""
        config = self.config
        device = config.device
        if device == "cuda":
            device = torch.cuda.get_device_name()
        count = sum(p.numel() for p in self.model.parameters())
        print(f"corpus  {config.data or 'built in'}: "
              f"{describe(self.splits, self.tokenizer, config)}")
        print(f"model   {config.out}: {count:,} parameters, at step {self.step:,} of "
              f"{config.max_iters:,}, on {device} in {config.dtype}")
        if config.compile and self.step < config.max_iters:
            print("the first step compiles, which can take a minute")

    def report(self):
        """The last lines: how it went, and what to do next."""
        if self.losses:
            vals = [losses["val"] for losses in self.losses.values()]
            print(f"losses  last {vals[-1]:.4f}, best {min(vals):.4f}   {curve(vals)}")
        if self.config.device == "cuda":
            print(f"memory  {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU at most")
        print(sample(self.model, self.tokenizer, 500))
        if self.step < self.config.max_iters:
            print(f"\nstopped at step {self.step:,}; the same command carries on")
        else:
            print(f"\nfinished at step {self.step:,}; for more, raise --max_iters")
        print(f"weights of step {self.best_step():,}: python chat.py --model "
              f"{shlex.quote(self.config.out)}")


def train(**settings):
    """Trains a model, or carries on with the one in the file out. Returns it with its best weights,
    in eval mode. train(data="book.txt", max_iters=500) does just what the command line does, python
    gpt.py --data book.txt --max_iters 500. Each evaluation saves. A run that is killed loses the
    steps since then; started again, it does them again and ends as if it had never been stopped.
    ValueError, OSError or MemoryError for a user's mistake, in one line."""
    join_processes()
    config, saved, stamp = choose_settings(settings)
    if saved:
        refuse_contradictions(settings, config, saved, stamp)
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by {WORLD} processes")
    try:
        run = Run(config, saved, stamp)
        run.introduce()
        do_steps(run)
        run.model.load_state_dict(run.best)
        run.report()
    except (RuntimeError, MemoryError) as error:
        explain(error, config)
        raise
    return run.model.eval()


def do_steps(run):
    """The loop, with a bar that counts characters. Asked to stop, it saves after the step."""
    config = run.config
    characters = config.batch_size * config.grad_accum * config.block_size  # of a step
    hidden = None  # tqdm then hides the bar where there is no terminal
    if RANK > 0:
        hidden = True
    bar = tqdm(total=config.max_iters, initial=run.step, unit="char", unit_scale=characters,
               disable=hidden)
    while run.step < config.max_iters and not STOP:
        if run.evaluation_is_due():
            run.evaluate()
            run.save()
        batches = list(draw_batches(run.splits["train"], config, run.step))
        loss = training_step(run.fast_model, run.optimizers, batches, config, run.step)
        run.step += 1
        if STOP:
            break  # and save, before anything is shown: the terminal may be gone
        bar.update()
        if run.step % 10 == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    if STOP:
        run.save()
    elif run.evaluation_is_due():
        run.evaluate()
        run.save()
    bar.close()


# -------------------------------- finding fast settings -----------------------------------------
def tune(**settings):
    """Which settings are fastest depends on the machine, and only measuring tells (lessons:
    auto-tuning and efficiency testing). Times training with different ones, all with the same
    number of texts in a step, and prints the command of the fastest.
    ValueError if none can be trained."""
    if WORLD > 1:
        raise ValueError("--tune measures one process: start it without torchrun")
    config = choose_settings(settings)[0]
    splits, tokenizer = load_corpus(config)
    fastest = 0.0
    command = ""
    for trial in trials(config):
        changes = dict(batch_size=trial.batch_size, grad_accum=trial.grad_accum, dtype=trial.dtype,
                       compile=trial.compile)
        try:
            rate = measure(trial, splits["train"], tokenizer.vocab_size)
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = " ".join(str(error).split())
            print(f"{as_flags(changes)}   failed: {reason[:90]}")
            continue
        print(f"{as_flags(changes)}   {rate:,.0f} characters a second")
        if rate > fastest:
            fastest = rate
            command = as_flags(dict(settings, **changes))
    if not command:
        raise ValueError("no setting could be trained; the lines above say why")
    print(f"fastest: python gpt.py {command}")


def trials(config):
    """Yields configs with the same total batch, done in 1, 2 or 4 parts if it can be divided."""
    total = config.batch_size * config.grad_accum
    for parts in (1, 2, 4):
        for dtype in CHOICES["dtype"]:
            for compiled in (False, True):
                if total % parts == 0:
                    yield replace(config, batch_size=total // parts, grad_accum=parts, dtype=dtype,
                                  compile=compiled)


def measure(config, data, vocab_size):
    """Characters per second of training, from a clean start: nothing that was compiled or left in
    memory before counts. Of six steps the fastest counts, as the first ones compile and warm up."""
    torch.compiler.reset()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    model, optimizers, fast_model = build(config, vocab_size)
    batches = list(draw_batches(data, config, step=0))
    seconds = []
    for step in range(6):
        start = time.perf_counter()
        loss = training_step(fast_model, optimizers, batches, config, step)
        loss.item()  # a GPU works on while Python goes on: to ask for the number is to wait
        seconds.append(time.perf_counter() - start)
    characters = config.batch_size * config.grad_accum * config.block_size
    return characters / min(seconds)


def as_flags(settings):
    """{name: value} -> the words of a command line."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# -------------------------------- the command line ----------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake is one line on stderr and exit status 2. (argparse calls this as well.)"""
        line = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {printable(line)}\n")


def open_streams():
    """Output that the shell has closed is None in Python: here it becomes a file that forgets all.
    A terminal without UTF-8 cannot show all characters: it shows "?" instead. A log grows line by
    line. (A notebook's streams have no reconfigure, and need none.)"""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r+"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)


def meanings():
    """{setting: the comment behind it in Config}. Python does not keep comments, so this reads
    them from the source, as they stand above."""
    found = {}
    for line in inspect.getsource(Config).splitlines():
        setting, _, comment = line.partition("  # ")
        name = setting.split(":")[0].strip()
        found[name] = comment
    return found


def make_parser():
    """Each field of Config is a flag."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False,
                    usage="python gpt.py [--data book.txt] [--max_iters 500] ...",
                    argument_default=argparse.SUPPRESS)  # a flag that is not given is absent
    meaning = meanings()
    defaults = asdict(Config(**defaults_for(Config.device)))
    for field in fields(Config):
        words = f"{meaning[field.name]} (default: {defaults[field.name]})"
        if field.type is bool:  # --compile and --no-compile
            kind = argparse.BooleanOptionalAction
            parser.add_argument(f"--{field.name}", action=kind, help=words)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, metavar="", help=words)
    parser.add_argument("--tune", action="store_true", help="find the fastest settings instead")
    return parser


def main(argv=None):
    """Reads the words of the command line and calls train, or tune."""
    parser = make_parser()
    settings = vars(parser.parse_args(argv))
    work = train
    on_signal = ask_to_stop
    if settings.pop("tune", False):
        work = tune
    if work is tune or WORLD > 1:
        on_signal = signal.SIG_DFL  # ends at once
    before = {}  # {signal: what is called for it now}, to be put back at the end
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Ctrl-C, kill, and a terminal that was closed
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            before[number] = signal.signal(number, on_signal)
    try:
        work(**settings)
    except (ValueError, OSError, MemoryError) as error:
        parser.error(error)
    finally:  # a notebook goes on after this
        STOP.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    open_streams()
    main()
