"""A character-level GPT in one file: it reads text character by character and learns to write more.

    python gpt.py                    train on the documentation that comes with Python
    python gpt.py --data book.txt    train on any text; the same command again carries on
    python gpt.py --help             every setting below is a flag of the same name
    python chat.py                   talk to the model

GPT stands for generative pre-trained transformer: it generates text, was trained on much of it
beforehand, and is built like the Transformer, a network published in 2017. What it writes should
read like the text that it was trained on, without being a copy. The file follows the freeCodeCamp
course "Create a Large Language Model from Scratch with Python". Part one is the lesson: what a GPT
is and how it learns. Part two keeps a run safe and makes it fast; a first reading may skip it.
Capital letters in comments stand for sizes, each of which is explained where it first matters:
    B  batch: texts worked on side by side      H  attention heads
    T  time: characters in each text            D  head size, C / H
    C  channels: numbers for each character     V  vocabulary: different characters
"""
import argparse, atexit, codecs, inspect, io, itertools, json, math, os, platform, random, re
import shlex, shutil, signal, sys, time, warnings, zipfile, zlib
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
    changes one of them. A value that cannot work raises a ValueError that names the setting."""
    data: str = ""                # text file, folder of them, .jsonl of pairs, or prepared folder
    out: str = ""                 # file of the trained model; if empty, named after the data
    init_from: str = ""           # file of a trained model that a new run starts from (fine-tuning)
    batch_size: int = 16          # texts worked on at once: B
    block_size: int = 128         # characters that the model sees at most: T
    grad_accum: int = 1           # batches that make up one training step
    max_iters: int = 1920         # training steps in all
    n_embd: int = 128             # numbers that describe each character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # layers (class Block) on top of each other; 0: no attention
    dropout: float = 0.05         # share of numbers turned off in training (see FeedForward)
    optimizer: str = "adamw"      # adamw or muon, which move the weights (see make_optimizers)
    learning_rate: float = 3e-3   # size of a training step at its largest
    weight_decay: float = 0.2     # how strongly weights are pulled to 0, against learning by heart
    warmup_iters: int = 100       # steps in which the learning rate climbs; at most half of a run
    grad_clip: float = 1.0        # limit for gradients (see training_step); 0: no limit
    eval_interval: int = 320      # steps between two evaluations, each of which saves
    eval_iters: int = 20          # batches of each split that an evaluation reads
    seed: int = 1337              # where the random numbers start
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # float32, or bfloat16: half the bits, faster on some machines
    compile: bool = False         # let torch.compile turn the model into faster code

    def __post_init__(self):
        check(self)  # in part two; dataclass calls __post_init__ at the end of its __init__


# -------------------------------- tokenizer and data --------------------------------------------
END = "\x03"    # ASCII's "end of text" comes after each document, so the model learns when to stop
UNK = "\ufffd"  # Unicode's replacement character stands for whatever is not in the vocabulary


class CharTokenizer:
    """Turns characters into token ids and back (in the course: an encoder and a decoder).
    The vocabulary is the sorted set of characters, with END and UNK. It is small, but texts become
    long. With words, the vocabulary would be large and texts short; subwords (byte-pair encoding,
    BPE, as in GPT-2) lie in between. The course has
        char_to_id = {char: id for id, char in enumerate(chars)}
        id_to_char = {id: char for id, char in enumerate(chars)}
    Here chars[id] is the character of an id. From characters to ids we use an array, since numpy
    looks up a whole text in it at once: code_to_id[104] is the id of "h", as 104 is the number of
    "h" in Unicode.
    ValueError if there are more than 65,536 different characters."""

    def __init__(self, chars):
        self.chars = "".join(sorted(set(chars) | {END, UNK}))
        self.vocab_size = len(self.chars)
        if self.vocab_size > 2**16:
            raise ValueError(f"{self.vocab_size:,} different characters are too many: the limit is "
                             f"{2**16:,} (prepare_owt.py --min_count makes rare ones unknown)")
        self.end = self.chars.index(END)
        self.unk = self.chars.index(UNK)
        # First UNK's id for every character of Unicode, then those of the vocabulary get their own.
        self.code_to_id = np.full(sys.maxunicode + 1, self.unk, np.uint16)
        codes = [ord(char) for char in self.chars]
        self.code_to_id[codes] = np.arange(self.vocab_size)

    def encode(self, text):
        """str -> ids, 1-D uint16. Characters outside the vocabulary become UNK; it never fails."""
        return self.code_to_id[codes_of(text)]  # codes_of, in part two: "hi" is 104, 105

    def decode(self, ids):
        """Ids, a list or an integer array -> str."""
        return "".join(self.chars[id] for id in ids)


def load_data(config, chars=""):
    """The corpus that config.data names -> ({"train": ids, "val": ids}, tokenizer); 1-D uint16 ids.
    Without a name, it is the documentation that comes with Python, half a million characters.
    The first 90 % are for training, the rest for validation: an exam needs questions that the
    homework did not have, or learning by heart would look like learning.
    chars: the vocabulary, if there is a model already, which knows no other characters.
    ValueError if the corpus is too short or damaged, OSError if it cannot be read."""
    kind = kind_of(config.data)  # this, and whatever reads files, is in part two
    if kind == "prepared folder":
        # From prepare_owt.py, for a corpus larger than memory: its ids stay on the disk.
        splits, tokenizer = open_prepared(config.data)
        found = tokenizer.chars
    elif kind == "pairs":
        # Prompts with their answers, for fine-tuning.
        pairs = read_pairs(config.data)
        found = characters_of(pairs)
        train, val = split_pairs(pairs, config.seed)
        tokenizer = CharTokenizer(chars or found)
        splits = {"train": encode_pieces(train, tokenizer), "val": encode_pieces(val, tokenizer)}
    else:
        # A text is read twice, in pieces: for its characters, and then for their ids.
        found = characters_of(read_documents(config.data))
        tokenizer = CharTokenizer(chars or found)
        ids = encode_pieces(read_documents(config.data), tokenizer)
        cut = int(0.9 * len(ids))
        splits = {"train": ids[:cut], "val": ids[cut:]}
    report_unknown(found, splits, tokenizer)
    fit_blocks(splits, config)  # a split must be longer than a block
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
    # With T = 2, starts 5 and 9 read the places 5, 6, 7 and 9, 10, 11. A column of starts plus a
    # row of 0, 1, 2 is a table of these places, with a row for each text.
    offsets = np.arange(config.block_size + 1)
    places = starts[:, None] + offsets          # (B, 1) + (T + 1,) -> (B, T + 1)
    ids = data[places].astype(np.int64)         # the id at each place; only these are read
    blocks = torch.from_numpy(ids)
    if config.device == "cuda":
        blocks = blocks.pin_memory()            # so that it can be copied while Python goes on,
    blocks = blocks.to(config.device, non_blocking=True)  # which is what non_blocking asks for
    return blocks[:, :-1], blocks[:, 1:]


# -------------------------------- model ---------------------------------------------------------
class Head(nn.Module):
    """Self-attention: how a character looks at those before it (Vaswani et al. 2017).
    Each character comes with three lists of D numbers. Its query says what it is looking for, its
    key what it contains, its value what it passes on. MultiHeadAttention, the next class, makes
    them from what is known of the character, with weights that are learned. The dot product of a
    query and a key (multiply number by number, then add up) is a score for how well the two fit.
    The scores become shares, and each character takes that mixture of the values. Older networks,
    called recurrent, read one character after the other; here all positions look back at the same
    time, which is what GPUs are good at.
    q, k, v: (B, H, T, D), the queries, keys and values of all texts and heads, in one call. The
    course has a module for each head, which computes the same, only more slowly."""

    def written_out(self, q, k, v):
        """What forward computes, step by step, for reading and for trying out with print."""
        T, D = q.shape[-2:]
        # In a matrix product, @, each number is the dot product of a row and a column, so the inner
        # sizes must agree: (T, D) @ (D, T) -> (T, T), a score for each query and key, in each text
        # and head.
        scores = q @ k.transpose(-2, -1)                          # (B, H, T, T)
        # A sum of D products grows like sqrt(D), as plus and minus partly cancel (100 coin tosses,
        # +1 or -1 each, sum up to some 10, not 100). If scores were large, one character would get
        # nearly all of the share, and whatever the others have to say would be lost.
        scores = scores / math.sqrt(D)
        # Position t sees positions 0 to t, the lower triangle: the rest is the future, which the
        # model is to predict. (The course keeps this constant mask in a register_buffer, a tensor
        # that moves to the GPU with the model but is not learned.)
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)          # whose share is e ** -inf = 0
        # Softmax: e ** score, divided by the sum of these in the row. So they become shares of 1.
        shares = scores.softmax(dim=-1)                           # (B, H, T, T)
        return shares @ v                                         # (B, H, T, D)

    def forward(self, q, k, v):
        # The same in one call, which on most devices never stores the T x T scores. is_causal is
        # the mask. (When the model writes, there is often a single query, the newest character's,
        # which may see all keys.)
        several = bool(q.shape[-2] > 1)
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
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # no bias in the course
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H = self.n_head
        D = C // H
        # One product makes the queries, keys and values of all heads, side by side.
        q, k, v = self.qkv(x).split(C, dim=2)        # (B, T, 3 C) -> (B, T, C) each
        # C is cut into H pieces of D; then T and H change places: each head gets a (T, D). (view
        # keeps the numbers in their order and only divides them differently: it cannot swap.)
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
    (Sigmoid and tanh are no straight lines either, but nearly flat for large inputs, where little
    can be learned.) Dropout turns off random activations (numbers between layers) in training, so
    that none can rely on another being there."""

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd),
                         nn.ReLU(),
                         nn.Linear(4 * config.n_embd, config.n_embd),
                         nn.Dropout(config.dropout))


class Block(nn.Module):
    """Attention, then feed-forward: one layer of the model. (B, T, C) -> (B, T, C).
    Each result is added to its input. This is called a residual: what was known is kept, and each
    layer only adds to it. (Gradients, by which a model learns, come back through a sum as well as
    through the layer beside it, so that they do not fade on the way to the first layers.) A norm
    follows each sum: it brings each character's C numbers to mean 0 and variance 1, so that they
    keep one scale from layer to layer. Then each of the C gets a factor and an offset of its own,
    which are learned, in case another scale serves better. This order is post-norm, as in the
    course. GPT-2 uses pre-norm, x + sublayer(norm(x)), which is easier to train; with post-norm,
    gradients are large at first, so training has to begin with small steps (see learning_rate).
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
    character. Attention compares characters, but does not see where they stand, so a second table
    has a row for each position. All these numbers start at random and are learned. (The first
    Transformer computed the rows of its positions with sines.)"""

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

    @torch.inference_mode()  # keeps nothing for backward, which only training needs
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues index, int64 (B, T) with T >= 1, by one new character at a time, (B, 1). yield
        hands it out; when the next one is asked for, the function goes on from there.
        temperature and top_k: see draw.
        cache keeps the keys and values of what was read, so that only the newest character has to
        be read. They stay valid, because each character sees only those before it, in every layer:
        what comes later changes nothing in what an earlier one knows.
        The model sees block_size characters. When the text gets one too long, only its last half is
        kept. These characters then have new positions, from 0 on, and a key is made from a
        character and its position. So the keys in the cache no longer hold, and the half is read
        again, into an empty one. This happens once in block_size / 2 characters."""
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
    the likeliest. top_k allows only the k likeliest. (Among equally likely characters,
    temperature 0 and top_k prefer the first in the vocabulary.)"""
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
    for them. PyTorch knows what needs more digits (norm, softmax, loss) and keeps it in float32."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def estimate_loss(model, splits, config):
    """Mean loss of each split, over eval_iters batches: {"train": float, "val": float}.
    The batches are spread evenly over the split and the same every time, so that two evaluations
    can be compared. eval() turns dropout off, train() on again, if it was on; no_grad() keeps
    nothing for backward, which only training needs. Overfitting is when train keeps falling while
    val rises: it learns by heart. More text, more dropout, a smaller model or fewer steps help.
    (train, in part two, keeps the weights with the lowest val.)"""
    was_training = model.training
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
    model.train(was_training)
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
    stands for weight decay: apart from this, each matrix shrinks a little at every step, since
    learning single examples by heart needs large weights. fused=True does it all in one call."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and norms are not shrunk
    muon = []
    if config.optimizer == "muon":  # an option, in part two: another optimizer for the blocks
        matrices, muon = make_muon(model, matrices, config)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.99), fused=True)
    return [adamw, *muon]


def learning_rate(step, config):
    """How far a step of gradient descent goes: too far overshoots, too short crawls. It climbs
    while gradients are large and the optimizer's averages are still guesses, then falls in a line
    towards 0, to settle. To find a good rate, try a few, each 3 times the last, for some hundred
    steps, and look at the losses."""
    warmup = min(config.warmup_iters, config.max_iters // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    rest = (config.max_iters - step) / (config.max_iters - warmup)  # what is left, from 1 to 0
    return config.learning_rate * rest


def training_step(model, optimizers, batches, config, step):
    """One step of gradient descent: forward, backward, step. Returns the mean loss of its batches.
    backward finds the gradients of all weights in one pass, from the loss back to the first layer,
    by the chain rule, and leaves each in weight.grad, where the optimizer finds it.
    batches: a list of tuples, (seed for dropout, x, y). With more than one, this is gradient
    accumulation: their gradients add up to those of one batch that memory could not hold."""
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
        optimizer.zero_grad()  # since backward adds to what is there: the next step starts from 0
    return total


def learn(model, splits, config):
    """The whole of training: again and again a batch and a step, and now and then a look at the
    losses. (python gpt.py runs train, in part two: the same loop, and what a long run needs.)"""
    optimizers = make_optimizers(model, config)
    data = splits["train"]
    for step in range(config.max_iters):
        if step % config.eval_interval == 0:
            print(step, estimate_loss(model, splits, config))
        starts = np.random.randint(len(data) - config.block_size, size=config.batch_size)
        x, y = get_batch(data, config, starts)
        batch = (step, x, y)  # the step is a seed for dropout as good as any
        training_step(model, optimizers, [batch], config, step)


# Here the lesson ends: this is all that a GPT is, and how it learns. A first reading may stop here.
# ================================ Part two: the craft ===========================================
# This part keeps a run safe and makes it fast. It goes from the whole to its parts: first a run,
# then what a run is made of, so that a reader may stop after any section.

# One process can use one GPU. torchrun, PyTorch's starter, runs WORLD processes that train one
# model together, on one machine or several, and gives each a number, its RANK. A process started
# without it is alone: RANK is 0 and WORLD is 1. LOCAL_RANK is a process's number on its machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
STOP = []  # the signals that have asked this program to end: see ask_to_stop


# -------------------------------- a run ---------------------------------------------------------
def train(**settings):
    """Trains a model, or carries on with the one that is in the file out. Returns it with its best
    weights, in eval mode. train(data="book.txt", max_iters=500) is python gpt.py --data book.txt
    --max_iters 500. Each evaluation saves. A run that is stopped without warning loses the steps
    since the last evaluation. Started again it repeats them, and on a CPU it ends with exactly the
    weights of a run that was never stopped. (In a single process, main sees to it that Ctrl-C saves
    as well.)
    A user's mistake raises ValueError, OSError or MemoryError with a message of one line."""
    join_processes()
    config, saved, carries_on = choose_settings(settings)
    try:
        run = Run(config, saved, carries_on)
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
    hidden = None  # for tqdm this means: hide the bar unless there is a terminal
    if RANK > 0:
        hidden = True
    with tqdm(total=config.max_iters, initial=run.step, unit="char", unit_scale=characters,
              dynamic_ncols=True, disable=hidden) as bar:
        while run.step < config.max_iters:
            if run.evaluation_is_due():
                run.evaluate()
            batches = list(draw_batches(run.splits["train"], config, run.step))
            loss = training_step(run.fast_model, run.optimizers, batches, config, run.step)
            run.step += 1
            if STOP:  # save before anything is shown: the terminal may be gone
                run.save()
                return
            bar.update()
            if run.step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        if run.evaluation_is_due():
            run.evaluate()


def draw_batches(data, config, step):
    """Yields (seed, x, y) for this process's batches of a step: of two processes, the first takes
    batches 0, 2, 4 and so on. All random numbers follow from the run's seed and the step. So a run
    that carries on draws the same batches, and so do several processes together."""
    draw = np.random.default_rng((config.seed, step))
    size = (config.grad_accum, config.batch_size)
    starts = draw.integers(0, len(data) - config.block_size, size)
    seeds = draw.integers(0, 2**62, config.grad_accum)  # for dropout
    for number in range(RANK, config.grad_accum, WORLD):
        x, y = get_batch(data, config, starts[number])
        yield int(seeds[number]), x, y


class Run:
    """What a run of training is made of, and what it can do: evaluate, save, report."""

    def __init__(self, config, saved, carries_on):
        self.config = config
        self.is_new = not carries_on  # nothing has been written to config.out yet
        self.splits, self.tokenizer = load_data(config, saved.get("chars", ""))
        self.corpus = fingerprint(self.splits)
        if saved and self.tokenizer.chars != saved["chars"]:  # an id must keep its meaning
            raise ValueError(f"{config.data} was prepared with another vocabulary than the model's")
        self.model, self.optimizers, self.fast_model = build(config, self.tokenizer.vocab_size)
        self.step = 0     # how many steps it has done
        self.losses = {}  # {step: {"train": loss, "val": loss}}
        self.best = {}    # the best weights so far: {name: tensor}
        if carries_on:
            self.carry_on(saved)
        elif saved:
            self.model.load_state_dict(saved["best"])

    def carry_on(self, saved):
        """Takes over what the checkpoint holds. ValueError if it was trained on another text."""
        config = self.config
        if saved["corpus"] != self.corpus:
            cause = f"{config.data} has changed, or is another text"
            if not config.data:
                old = saved.get("python", "another version")
                cause = (f"it was trained on the documentation of Python {old}, and this is that "
                         f"of Python {platform.python_version()}")
            raise ValueError(f"{config.out} cannot carry on: {cause}; choose another --out, and "
                             f"--init_from {config.out} to start from its weights")
        restore(self.optimizers, saved["optimizer"], config.out)
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
        """Estimates the losses, saves, and prints a line that ends with what the model writes."""
        losses = estimate_loss(self.model, self.splits, self.config)
        self.losses[self.step] = losses
        self.save()
        text = sample(self.model, self.tokenizer, 60)
        line = " ".join(text.split())
        numbers = f"train {losses['train']:.4f}   val {losses['val']:.4f}"
        tqdm.write(f"step {self.step:6,d}   {numbers}   {line}")

    def best_step(self):
        """The step whose weights chat.py gets: the one with the lowest val. Step 0 does not count,
        as nothing was learned then; if there is no other evaluation yet, it is the latest step.
        For pairs, it is always the latest: there, val asks for facts that are not in train, so it
        rises while the model learns, and is lowest where it has learned least."""
        vals = {step: losses["val"] for step, losses in self.losses.items() if step > 0}
        if kind_of(self.config.data) == "pairs" or not vals:
            return self.step
        return min(vals, key=vals.get)

    def save(self):
        """Saves what the run needs to carry on. If the learning rate is too high, weights become
        infinite or nan. Saving them would ruin the file: ValueError. A new run does not write over
        a file that has appeared since it began: OSError."""
        config = self.config
        weights = self.model.state_dict()
        vals = torch.tensor([losses["val"] for losses in self.losses.values()])
        if not are_finite([vals, *weights.values()]):
            raise ValueError(f"step {self.step}: the loss or a weight is no longer a number, so "
                             "this was not saved: lower --learning_rate")
        if self.best_step() == self.step:
            # A copy, since the next step changes the weights in place.
            self.best = {name: tensor.clone() for name, tensor in weights.items()}
        if RANK > 0:
            return
        if self.is_new and os.path.exists(config.out):
            raise OSError(f"{config.out} was made by another run since this one began, so it is "
                          "left alone: name another --out")
        kept = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        save_checkpoint(config.out, dict(
            config=asdict(config), chars=self.tokenizer.chars, corpus=self.corpus,
            python=platform.python_version(), step=self.step, losses=self.losses, model=weights,
            best=self.best, optimizer=kept))
        self.is_new = False

    def introduce(self):
        """The first lines: what trains on what."""
        config = self.config
        device = config.device
        if device == "cuda":
            device = torch.cuda.get_device_name()
        count = sum(p.numel() for p in self.model.parameters())
        name = config.data or "built in"
        progress = f"at step {self.step:,} of {config.max_iters:,}"
        print(f"corpus  {name}: {describe(self.splits, self.tokenizer, config)}")
        print(f"model   {config.out}: {count:,} parameters, {progress}, on {device} in "
              f"{config.dtype}")
        if config.compile and self.step < config.max_iters:
            print("the first step compiles, which can take a minute")

    def report(self):
        """The last lines: how it went, and what to do next."""
        config = self.config
        vals = {step: losses["val"] for step, losses in self.losses.items()}
        if vals:
            last = vals[max(vals)]
            best = vals.get(self.best_step(), last)
            print(f"losses  last {last:.4f}, best {best:.4f}   {curve(list(vals.values()))}")
        if config.device == "cuda":
            gib = torch.cuda.max_memory_allocated() / 2**30
            print(f"memory  {gib:.2f} GiB of the GPU at most")
        print(sample(self.model, self.tokenizer, 500))
        if self.step < config.max_iters:
            print(f"\nstopped at step {self.step:,}; the same command carries on")
        else:
            print(f"\nfinished at step {self.step:,}; for more, raise --max_iters")
        command = f"python chat.py --model {shlex.quote(config.out)}"
        print(f"weights of step {self.best_step():,}: {command}")


# -------------------------------- settings ------------------------------------------------------
# What a model is made of, which stays as it is for as long as the model lives.
ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer")
# What is not taken over from a checkpoint: another machine may carry on, under another file name.
NOT_HANDED_DOWN = ("out", "device", "dtype", "compile")
# What may change while a run carries on. (batch_size and grad_accum may change as long as their
# product, the number of texts in a step, stays. data may be another path to the same text.)
MAY_CHANGE = (*NOT_HANDED_DOWN, "data", "max_iters", "eval_interval", "eval_iters", "batch_size",
              "grad_accum")
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


def defaults_for(device):
    """The values in Config are for a CPU. A GPU can work on a larger model: {name: value}."""
    if device != "cuda":
        return {}
    settings = dict(batch_size=64, block_size=256, n_embd=384, n_head=8, n_layer=8, dropout=0.3,
                    weight_decay=0.5, learning_rate=2e-3, warmup_iters=200, max_iters=600,
                    eval_interval=100, eval_iters=20)
    # A GPU without bfloat16 may emulate it, in several slow steps.
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        settings["dtype"] = "bfloat16"
    # What torch.compile writes for a GPU has to be built by a C compiler, which Windows rarely has.
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    found = any(shutil.which(name) for name in compilers)
    settings["compile"] = sys.platform == "linux" and found
    return settings


def choose_settings(given):
    """Settings that were given, {name: value} -> (config, saved, carries_on).
    What is not given comes from the checkpoint, if there is one; else from defaults_for; else from
    Config. If the file named by out exists, the run carries on with it. saved is what that file
    holds, or else the one named by init_from, or else {}."""
    config = Config(**given)  # a first one, to know which device and files are meant
    out = config.out
    if not out:  # book.txt gives book.pkl; abspath finds a name for the folder "." as well
        path = os.path.abspath(config.data or "model")
        out = Path(path).stem + ".pkl"
    saved, carries_on = find_checkpoint(out, config.init_from)
    settings = defaults_for(config.device)
    if carries_on:
        handed_down = set(saved["config"]) - set(NOT_HANDED_DOWN)
    elif saved:
        handed_down = ARCHITECTURE
    else:
        handed_down = ()
    for name in handed_down:
        settings[name] = saved["config"][name]
    settings.update(given)
    settings["out"] = out
    config = Config(**settings)
    if saved:
        path = out if carries_on else config.init_from
        refuse_changes(path, saved["config"], asdict(config), carries_on)
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by {WORLD} processes")
    return config, saved, carries_on


def refuse_changes(path, before, after, carries_on):
    """A trained model must not be lost to a flag that does not fit it, and no flag may be ignored
    in silence. before, after: {name: value}, what the checkpoint says and what was chosen now.
    ValueError names a setting that has to stay as it was."""
    before = what_stays(before, carries_on)
    after = what_stays(after, carries_on)
    for name in before:
        if before[name] != after[name]:
            raise ValueError(f"{path} was trained with {name} {before[name]!r}, not "
                             f"{after[name]!r}: drop the flag, or start a new run with another "
                             f"--out (and --init_from {path}, if its weights are wanted)")


def what_stays(settings, carries_on):
    """{name: value} of the settings that a checkpoint fixes, for a run that carries on with it or
    for a new one that starts from its weights."""
    if not carries_on:
        return {name: settings[name] for name in ARCHITECTURE}
    fixed = {name: settings[name] for name in settings if name not in MAY_CHANGE}
    fixed["batch_size * grad_accum"] = settings["batch_size"] * settings["grad_accum"]
    return fixed


def find_checkpoint(out, init_from):
    """A run that exists is carried on, never overwritten, so the file out is looked for first.
    Returns (what the checkpoint that was found holds, or {}; whether that is the file out)."""
    folder = os.path.dirname(os.path.realpath(out))
    if RANK == 0 and not os.path.isdir(folder):
        raise ValueError(f"{out} cannot be saved: there is no folder {folder}")
    found = [{}, os.path.exists(out)]
    path = out if found[1] else init_from
    if path and RANK == 0:
        found[0] = load_checkpoint(path)
    if WORLD > 1:  # process 0 sends what it found, since the others may have other disks
        torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found


# -------------------------------- checkpoints ---------------------------------------------------
def save_checkpoint(path, checkpoint):
    """Writes a dict. Killed at any instant, it leaves the old file or the new one, whole: it writes
    beside the file, and only then renames. OSError if saving failed; the old file is untouched."""
    path = Path(os.path.realpath(path))  # where a link points to, so that the link stays
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # model.pkl.4711.tmp in process 4711
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()             # from Python to the system
            os.fsync(file.fileno())  # from the system to the disk, before the old file goes
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not saved, the file is as it was: {error}")


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, onto the CPU -> dict.
    A pickle is Python's way to write objects to a file, and torch.save puts one into a zip, beside
    the tensors. Reading a pickle can run any code that its author liked. weights_only=True builds
    nothing but tensors and plain values, so that a stranger's file is safe.
    ValueError if the file is no checkpoint, or damaged; OSError if it cannot be read."""
    try:
        check_parts(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch prints long warnings about some foreign files
            saved = torch.load(path, map_location="cpu", weights_only=True)
            own_settings = set(asdict(Config()))
            same_version = set(saved["config"]) == own_settings
            if same_version:
                check_weights(saved)
    except Exception as error:  # a foreign file can fail in any way
        if isinstance(error, OSError) and error.filename:
            raise  # it could not even be opened
        if is_out_of_memory(error):
            raise ValueError(f"{path} does not fit in memory")
        raise ValueError(f"{path} is no checkpoint of gpt.py, or it is damaged")
    if not same_version:
        raise ValueError(f"{path} was made by another version of gpt.py, with other settings")
    return saved


def check_parts(path):
    """A damaged weight must not be taken for a good one. A zip has a checksum of each of its parts,
    a number that changes when the part does. torch.load does not look at it, but testzip does."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # the name of a part, or None
        # torch.save leaves these attributes at 0, and torch.load takes some of them for orders.
        flags = [part.external_attr for part in file.infolist()]
    if damaged or any(flags):
        raise ValueError("damaged")


def check_weights(saved):
    """Weights must fit the model that the file describes, and nothing that a run needs may be
    missing. Otherwise it raises an error, of whatever kind.
    The model is made on the device meta, where tensors have shapes but no numbers. So absurd sizes
    in a file cost no memory, and loading weights only compares their names and shapes."""
    missing = {"corpus", "step", "losses", "optimizer"} - set(saved)
    if missing:
        raise ValueError(f"without {missing}")
    config = Config(**saved["config"])
    tokenizer = CharTokenizer(saved["chars"])
    if tokenizer.chars != saved["chars"]:
        raise ValueError("not a vocabulary")
    with torch.device("meta"):
        model = GPT(config, tokenizer.vocab_size)
    for weights in (saved["model"], saved["best"]):
        model.load_state_dict(weights)
        if not are_finite(weights.values()):
            raise ValueError("weights are infinite or nan")


def are_finite(tensors):
    """True if none of their numbers is infinite or nan, "not a number"."""
    return all(tensor.isfinite().all() for tensor in tensors)


def restore(optimizers, states, path):
    """Gives optimizers back what they keep for each weight, as AdamW its two averages.
    states: for each optimizer, {number of a weight: {name: tensor}}. PyTorch does not check their
    sizes when it loads them, but relies on them later. ValueError if they do not fit."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            for weight in optimizer.state:
                check_kept(optimizer.state[weight], weight)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: what its optimizer kept does not fit the model: {error}")


def check_kept(kept, weight):
    """kept: {name: tensor}. "step" is a single number; all else has the weight's shape."""
    for name, tensor in kept.items():
        shape = weight.shape
        if name == "step":
            shape = ()
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(name)


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


# -------------------------------- reading texts -------------------------------------------------
def kind_of(path):
    """What --data names. All code that depends on the kind of a corpus calls this."""
    if not path:
        return "Python's documentation"
    if Path(path, "vocab.json").exists():
        return "prepared folder"
    if os.path.isdir(path):
        return "folder of texts"
    if path.lower().endswith((".jsonl", ".ndjson")):
        return "pairs"
    return "text"


def read_documents(path):
    """Yields all that path names in pieces, with END behind each document."""
    if not path:
        from pydoc_data.topics import topics
        for text in topics.values():
            yield clean(text) + END
        return
    names = [path]
    if os.path.isdir(path):
        names, _ = list_texts(path)
    for name in names:
        yield from read_text(name)
        yield END


def list_texts(folder):
    """The .txt files in a folder and in its folders -> (their paths, how many others there are)."""
    texts = []
    others = 0
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path.name.startswith("._"):  # macOS writes ._ files beside others
            continue
        if path.suffix.lower() == ".txt":
            texts.append(path)
        else:
            others += 1
    if not texts:
        raise ValueError(f"{folder}: neither .txt files nor the vocab.json of prepare_owt.py")
    return texts, others


def read_text(path):
    """Yields a text file in pieces, each of about a megabyte, so that it may be large.
    What is not text would be learned all the same, as noise. ValueError says where bytes are
    neither UTF-8 nor UTF-16, or where a NUL character shows that the file is not text."""
    advice = "save it as UTF-8, or use prepare_owt.py for an archive"
    line = 1
    with open(path, "rb") as file:
        encoding = encoding_of(file.peek(2))
        # Where a piece ends within a character, or between \r and \n, the decoder keeps its first
        # bytes until the next piece.
        decoder = codecs.getincrementaldecoder(encoding)()
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        at_end = False
        while not at_end:
            data = file.read(2**20)
            at_end = len(data) < 2**20
            try:
                piece = decoder.decode(data, at_end)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(encoding, "ignore")
                line += good.count("\n")
                raise ValueError(f"{path}, line {line:,}: this is not {encoding}; {advice}")
            before, nul, _ = piece.partition("\0")
            line += before.count("\n")
            if nul:
                raise ValueError(f"{path}, line {line:,}: a NUL, so this is no text; {advice}")
            yield piece.replace(END, UNK)


def codes_of(text):
    """str -> the number of each character in Unicode, 1-D uint32: "hi" becomes 104, 105."""
    # UTF-32 writes each character as its number, in 4 bytes, and frombuffer reads these bytes as
    # numbers. (surrogatepass: a text with halves of characters in it shall not raise an error.)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def characters_of(pieces):
    """Which characters occur in a text -> str, sorted. The text comes in pieces, any strings that
    follow each other, since a large one would take too much memory as a whole."""
    occurs = np.zeros(sys.maxunicode + 1, bool)  # for each character of Unicode: not yet
    for piece in pieces:
        occurs[codes_of(piece)] = True
    return "".join(chr(code) for code in np.flatnonzero(occurs))


def encode_pieces(pieces, tokenizer):
    """A text that comes in pieces -> its ids, 1-D uint16."""
    ids = bytearray()  # it grows in place, so only the ids and one piece of text are in memory
    for piece in pieces:
        ids += tokenizer.encode(piece).tobytes()
    return np.frombuffer(ids, np.uint16)


def encoding_of(data):
    """The encoding of a text that begins with these bytes: UTF-16 if it begins with UTF-16's
    byte-order mark, as some programs on Windows write it, else UTF-8. Python drops the mark when it
    decodes."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def clean(text):
    """What read_text does to a text, for a text that is in memory already. Line ends differ between
    systems, and a model would learn them as characters: all become "\\n". An END inside a text
    becomes UNK, since it means that the text is over."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace(END, UNK)


# The names that data sets use for a prompt and its answer: OpenOrca has question and response,
# Alpaca instruction, output, and sometimes an input, which belongs to the prompt.
PAIR_KEYS = (("prompt", "completion"), ("question", "answer"), ("question", "response"),
             ("instruction", "input", "output"), ("instruction", "output"))


def read_pairs(path):
    """A file with {"prompt": ..., "completion": ...} on each line -> a list of texts: prompt, line
    end, answer, END. ValueError names a line that holds no such pair."""
    pairs = []
    text = "".join(read_text(path))
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                pairs.append(parse_pair(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number:,}: {error}")
    if len(pairs) < 2:
        raise ValueError(f"{path}: at least two pairs are needed, one to train on and one to "
                         "validate on")
    return pairs


def parse_pair(line):
    """A line of read_pairs -> its text. ValueError says what is wrong with it."""
    try:
        pair = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"this is no JSON: {line[:60]}")
    if not isinstance(pair, dict):
        raise ValueError(f"no object with prompt and completion: {line[:60]}")
    if pair.get("input") == "":
        del pair["input"]
    for keys in PAIR_KEYS:
        if all(key in pair for key in keys):
            break
    else:  # the loop came to its end without a break
        raise ValueError(f"no prompt and completion; its keys are: {', '.join(pair) or 'none'}")
    for key in keys:
        if not isinstance(pair[key], str) or "\0" in pair[key]:
            raise ValueError(f"{key} must be a text, not {json.dumps(pair[key])[:60]}")
    return clean("\n".join(pair[key] for key in keys)) + END


def split_pairs(pairs, seed):
    """A list of pairs -> (those to train on, those to validate on), nine tenths and a tenth.
    The training pairs are repeated, each time in a new order, until they are at least a million
    characters: in one fixed order, a model would learn which question follows which."""
    cut = int(0.9 * len(pairs))
    once = sum(len(pair) for pair in pairs[:cut])
    rng = random.Random(seed)
    train = []
    for _ in range(math.ceil(1e6 / once)):
        train += rng.sample(pairs[:cut], cut)
    return train, pairs[cut:]


def open_prepared(folder):
    """The folder of prepare_owt.py -> (splits, tokenizer). An array of np.memmap looks like any
    other, but reads from its file only what is used, so that a corpus may be larger than memory.
    ValueError if the files do not belong together: if one was cut, or comes from another folder,
    a run would learn nonsense."""
    folder = Path(folder)
    splits = {}
    try:
        corpus = json.loads((folder / "corpus.json").read_bytes())
        vocabulary = (folder / "vocab.json").read_bytes()
        fits = zlib.crc32(vocabulary) == corpus["checksum"]
        for name in ("train", "val"):
            splits[name] = np.memmap(folder / f"{name}.bin", np.uint16, "r")  # r: read only
            fits = fits and len(splits[name]) == corpus[name]
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise ValueError(f"{folder}: its files are damaged or do not belong together; run "
                         "prepare_owt.py again")
    return splits, CharTokenizer(json.loads(vocabulary))


def report_unknown(found, splits, tokenizer):
    """A model that was trained on other characters reads all new ones as UNK, and cannot learn to
    tell them apart, so some of these characters are printed. found: the characters of the text."""
    unknown = sorted(set(found) - set(tokenizer.chars))
    if unknown:
        share = np.mean(splits["train"] == tokenizer.unk)
        some = printable(" ".join(unknown[:20]))
        print(f"unknown {share:.1%} of the text to train on are characters that this model does "
              f"not know: {some}")


def fit_blocks(splits, config):
    """A split must be longer than a block. If there are too few pairs, they are repeated: 50 ids
    three times, for a block of 128. ValueError for any other short text."""
    for name, ids in splits.items():
        if kind_of(config.data) == "pairs":
            copies = 1 + config.block_size // len(ids)
            splits[name] = np.tile(ids, copies)
        elif len(ids) < 2:
            raise ValueError(f"{config.data}: too short for a {name} split")
        elif len(ids) <= config.block_size:
            raise ValueError(f"{config.data}: the {name} split has {len(ids):,} characters, which "
                             f"is too short for block_size {config.block_size}: try "
                             f"--block_size {len(ids) - 1}")


def fingerprint(splits):
    """A run that carries on must have the text that it began with. Returns what identifies a text,
    {name of a split: [length, checksum]}. The checksum is of 1,000 pieces, evenly spread, since
    reading all of OpenWebText would take minutes."""
    found = {}
    for name, ids in splits.items():
        checksum = 0
        for start in np.linspace(0, len(ids), 1000, endpoint=False, dtype=np.int64):
            checksum = zlib.crc32(ids[start : start + 2**14], checksum)
        found[name] = [len(ids), checksum]
    return found


# -------------------------------- devices and processes -----------------------------------------
def build(config, vocab_size):
    """Makes a new model on its device, and returns (model, optimizers, fast_model).
    torch.compile turns a model into faster code. fast_model is that code; it shares the model's
    weights, so that training it trains the model. Where nothing is compiled, it is the model
    itself. On a GPU, a step is hundreds of small computations, and starting them one by one from
    Python takes longer than the computations. The compiler's mode reduce-overhead records them
    once, as a CUDA graph, and then starts them all together. But a graph writes its results to the
    same place each time, so that the gradients of a second batch would replace those of the first
    instead of being added. So this mode is for steps of a single batch."""
    prepare_device(config)
    torch.manual_seed(config.seed)
    model = GPT(config, vocab_size).to(config.device)
    optimizers = make_optimizers(model, config)
    fast_model = model
    if config.compile:
        mode = "default"
        if config.device == "cuda" and config.grad_accum == 1:
            mode = "reduce-overhead"
        fast_model = torch.compile(model, mode=mode)
    return model, optimizers, fast_model


def prepare_device(config):
    """Gives a missing device a clear message: ValueError. Sets a GPU up for speed.
    A CPU has few fast cores, a GPU thousands of slow ones, which suits matrix products. CUDA is how
    NVIDIA's GPUs are programmed. .to(device) moves tensors, and those that are used together must
    be on the same device.
    (A GPU adds up numbers in the order in which its threads finish, so that the last digits differ
    from run to run. torch.use_deterministic_algorithms(True), with CUBLAS_WORKSPACE_CONFIG=:4096:8
    in the environment, makes them equal, and training slower.)"""
    if not getattr(torch, config.device).is_available():
        raise ValueError(f"device {config.device}: this machine, or its torch, has none")
    if config.device != "cuda":
        return
    if LOCAL_RANK >= torch.cuda.device_count():
        raise ValueError(f"process {LOCAL_RANK + 1} of this machine has no GPU: there are "
                         f"{torch.cuda.device_count()}, so lower --nproc_per_node")
    torch.cuda.set_device(LOCAL_RANK)
    torch.set_float32_matmul_precision("high")  # TF32: fewer digits, far faster
    # Of PyTorch's ways to compute attention, cuDNN's first prepares itself for each new length T,
    # and in generation each character makes the text longer by one.
    torch.backends.cuda.enable_cudnn_sdp(False)


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


def average_gradients(model):
    """Several processes that train one model have different batches, hence different gradients. All
    take the mean, as one vector, once a step: so all do the same step, and stay equal."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    vector = nn.utils.parameters_to_vector(gradients)
    torch.distributed.all_reduce(vector)  # now it is the sum over all processes
    nn.utils.vector_to_parameters(vector / WORLD, gradients)  # each gets its part of the mean


def is_out_of_memory(error):
    """Whether an error means that memory was full, be it Python's, PyTorch's, CUDA's, cuBLAS's or
    Triton's."""
    words = ("out of memory", "allocate", "ALLOC_FAILED", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def explain(error, config):
    """A user can do something about some errors from deep inside PyTorch: these are raised again,
    with one line that says what. Any other error keeps its traceback."""
    if is_out_of_memory(error):
        advice = "smaller block_size, n_embd or n_layer"
        if config.batch_size > 1:
            half = config.batch_size // 2
            advice = f"--batch_size {half} --grad_accum {2 * config.grad_accum}, then {advice}"
        raise MemoryError(f"out of memory: try {advice}; for a text that is too large, "
                          "prepare_owt.py") from error
    if type(error).__module__.startswith("torch._"):  # torch._dynamo, torch._inductor: the compiler
        message = " ".join(str(error).split())
        raise ValueError(f"torch.compile failed, try --no-compile: {message[:200]}") from error


def make_muon(model, matrices, config):
    """Returns (the matrices that are left to AdamW, [Muon] for those of the blocks)."""
    inside = set(model.blocks.parameters())
    for_muon = [p for p in matrices if p in inside]
    for_adamw = [p for p in matrices if p not in inside]
    return for_adamw, [Muon(for_muon, config)]


class Muon(torch.optim.Optimizer):
    """An optimizer for matrices that often needs fewer steps than AdamW (Jordan 2024).
    The gradient of a matrix is a wish for changes: a few strong ones, on which many examples agree,
    and many weak ones. Muon makes all of them about equally strong before it moves the weights
    (see equalize), so that the weak ones are learned as well. Before that it averages the gradients
    of some twenty steps, against the noise. Its steps have the size of AdamW's, so that one
    learning rate serves both. Matrices of equal shape (each block has the same ones) are worked on
    together, which is faster."""

    def __init__(self, matrices, config):
        self.config = config
        defaults = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
        super().__init__([{"params": matrices}], defaults)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        rate = group["lr"]
        decay = rate * group["weight_decay"]
        same_shape = {}  # {shape: the matrices that have it}
        for weight in group["params"]:
            same_shape.setdefault(weight.shape, []).append(weight)
        for shape, weights in same_shape.items():
            moves = []
            for weight in weights:
                kept = self.state[weight]
                if not kept:
                    kept["momentum_buffer"] = torch.zeros_like(weight)
                average = kept["momentum_buffer"]
                average.lerp_(weight.grad, 0.05)  # 0.95 * average + 0.05 * gradient
                moves.append(weight.grad.lerp(average, 0.95))  # Nesterov: the newest once more
            with autocast(self.config):
                moves = equalize(torch.stack(moves))
            size = 0.2 * math.sqrt(max(shape))  # makes steps as large as AdamW's
            for weight, move in zip(weights, moves):
                weight.mul_(1 - decay)
                weight.sub_(move, alpha=rate * size)


def equalize(x):
    """Brings the changes that matrices stand for, (n, rows, columns), to about the same strength.
    Take a matrix with numbers on its diagonal alone, say 0.9 and 0.1: they are the strengths of its
    changes. x @ x.mT @ x has 0.9 ** 3 and 0.1 ** 3 on its diagonal, so one round below makes
    3.4445 * f - 4.7750 * f ** 3 + 2.0315 * f ** 5 of a strength f: 0.82 of 0.9, but 0.34 of 0.1.
    After five rounds, all that began above 0.01 lie between 0.68 and 1.14. Any other matrix is a
    diagonal one between two rotations, which these products leave as they are: so the calculation
    holds for every matrix. (The numbers are Jordan's; it is called a Newton-Schulz iteration.)"""
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # rows and columns change places: the products below are smaller then
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now no strength is above 1
    one = torch.eye(x.shape[1], device=x.device)  # one @ x is x
    for _ in range(5):
        square = x @ x.mT
        x = (3.4445 * one - 4.7750 * square + 2.0315 * square @ square) @ x
    if is_tall:
        x = x.mT
    return x


# -------------------------------- what a run says -----------------------------------------------
def printable(text):
    """Some characters would move a terminal's cursor, or worse. Control characters except tab and
    line end, those that turn the direction of writing, and halves of characters become UNK."""
    control = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
    direction = r"\u202a-\u202e\u2066-\u2069"
    halves = r"\ud800-\udfff"
    return re.sub(f"[{control}{direction}{halves}]", UNK, text)


def sample(model, tokenizer, length):
    """Some text that the model writes now. It sets torch's seed, which does not disturb training:
    training_step sets it anew for each batch."""
    torch.manual_seed(model.config.seed)
    start = torch.tensor([[tokenizer.end]]).to(model.config.device)  # a text begins after an END
    was_training = model.training
    model.eval()
    ids = model.generate(start, length, temperature=0.8)
    model.train(was_training)
    text = tokenizer.decode(ids[0, 1:].tolist())
    return printable(text.replace(END, "\n"))


def curve(losses):
    """A row of blocks for a list of losses: the lowest is ▁ and the highest █."""
    low = min(losses)
    height = max(losses) - low
    row = ""
    for loss in losses:
        share = (loss - low) / max(height, 1e-9)  # 0 to 1; 0 if all are equal
        row += "▁▂▃▄▅▆▇█"[round(7 * share)]
    return row


def describe(splits, tokenizer, config):
    """The line about a corpus: what kind it is, how much there is, and what was not read."""
    kind = kind_of(config.data)
    count = sum(len(ids) for ids in splits.values())
    line = f"{kind}, {count:,} characters, {tokenizer.vocab_size:,} different ones"
    if kind == "folder of texts":
        _, others = list_texts(config.data)
        line += f"; {others:,} files do not end in .txt and were not read"
    if kind == "pairs":  # the ids repeat them, so they are counted in the file
        pairs = read_pairs(config.data)
        train = int(0.9 * len(pairs))
        too_long = sum(len(pair) > config.block_size for pair in pairs)
        line = (f"pairs, {train:,} to train on and {len(pairs) - train:,} kept back; "
                f"{too_long:,} are longer than block_size")
    return line


# -------------------------------- finding fast settings -----------------------------------------
def tune(**settings):
    """Which settings are fastest depends on the machine, and only measuring tells (in the course:
    auto-tuning and efficiency testing). Times training with each dtype, compiled and not, with the
    whole batch at once, and with the batch divided into 2 and 4 parts (grad_accum).
    ValueError if none can be trained."""
    if WORLD > 1:
        raise ValueError("--tune measures one process: start it without torchrun")
    config, _, _ = choose_settings(settings)
    splits, tokenizer = load_data(config)
    total = config.batch_size * config.grad_accum
    rates = {}  # {flags: characters a second}
    for parts, dtype, compiled in itertools.product((1, 2, 4), CHOICES["dtype"], (False, True)):
        if total % parts > 0:
            continue
        trial = replace(config, batch_size=total // parts, grad_accum=parts, dtype=dtype,
                        compile=compiled, max_iters=6)
        flags = f"--batch_size {trial.batch_size} --grad_accum {parts} --dtype {dtype} "
        flags += "--compile" if compiled else "--no-compile"
        try:
            rates[flags] = measure(trial, splits["train"], tokenizer.vocab_size)
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = " ".join(str(error).split())
            print(f"{flags}   failed: {reason[:90]}")
        else:
            print(f"{flags}   {rates[flags]:,.0f} characters a second")
    if not rates:
        raise ValueError("no setting could be trained; the lines above say why")
    print(f"the fastest; add to your command: {max(rates, key=rates.get)}")


def measure(config, data, vocab_size):
    """Characters per second of training. It starts afresh, without what earlier trials compiled or
    left in memory, and takes the fastest step, as the first ones compile and warm up."""
    torch.compiler.reset()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    model, optimizers, fast_model = build(config, vocab_size)
    batches = list(draw_batches(data, config, step=0))
    seconds = []
    for step in range(config.max_iters):
        start = time.perf_counter()
        loss = training_step(fast_model, optimizers, batches, config, step)
        loss.item()  # Python does not wait for a GPU, unless it asks for a number
        seconds.append(time.perf_counter() - start)
    characters = config.batch_size * config.grad_accum * config.block_size
    return characters / min(seconds)


# -------------------------------- the command line ----------------------------------------------
def main(argv=None):
    """Reads the words of the command line and calls train, or tune."""
    parser = make_parser()
    settings = vars(parser.parse_args(argv))
    tuning = settings.pop("tune", False)
    before = {}
    if WORLD == 1 and not tuning:
        before = catch_signals()  # several processes and tune just end
    try:
        if tuning:
            tune(**settings)
        else:
            train(**settings)
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C
    except (ValueError, OSError, MemoryError) as error:
        parser.error(str(error) or "out of memory")  # Python's own MemoryError says nothing
    finally:  # in a notebook, Python keeps running
        STOP.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake is one line on stderr and exit status 2. (argparse calls this as well.)"""
        line = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {printable(line)}\n")


def make_parser():
    """Each field of Config is a flag, and the comment behind it says what it means."""
    parser = Parser(description="Train a character-level GPT.", allow_abbrev=False,
                    usage="python gpt.py [--data book.txt] [--max_iters 500] ...",
                    argument_default=argparse.SUPPRESS)  # a flag that is not given is absent
    # Python does not keep comments, so they are read from the source of Config.
    meaning = {}
    for line in inspect.getsource(Config).splitlines():
        setting, _, comment = line.partition("  # ")
        name, _, _ = setting.strip().partition(":")
        meaning[name] = comment
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


def catch_signals():
    """From now on, Ctrl-C, the command kill and a terminal that is closed call ask_to_stop. Returns
    {signal: what it called before}."""
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            before[number] = signal.signal(number, ask_to_stop)
    return before


def ask_to_stop(number, frame):
    """Python calls this when a signal comes: train ends its step, saves and stops."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # the default: a second one ends Python at once


def set_up_streams():
    """A terminal without UTF-8 cannot show all characters: it shows "?" instead of failing. Lines
    are written at once, so that a log is up to date. newline=None: whatever ends the lines that are
    read, Python sees "\\n". (A notebook's streams need none of this.)"""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True, newline=None)


if __name__ == "__main__":
    set_up_streams()
    main()
