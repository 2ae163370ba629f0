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
    T  time: characters in each text            D  size of a head, C / H
    C  channels: numbers for each character     V  vocabulary: different characters
"""
# Most of these are for part two.
import argparse, atexit, codecs, inspect, io, itertools, json, math, os, platform, random, re
import shlex, shutil, signal, sys, time, warnings, zipfile, zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
from tqdm import tqdm


# ================================ Part one: the lesson ==========================================
@dataclass
class Config:
    """The settings of a run, which are called hyperparameters. People choose them; the parameters
    are what the model learns. Do not try to understand them all now: each is explained below, where
    it is used. (A dataclass lists names, types and values. Config() has the values below, and
    Config(n_layer=2) has the same, except that n_layer is 2. A value that cannot work raises
    ValueError.)"""
    data: str = ""                # text, folder of texts or by prepare_owt.py, or pairs (.jsonl)
    out: str = ""                 # file to save the model in; if empty, it is named after the data
    init_from: str = ""           # file of a trained model to start from (fine-tuning)
    batch_size: int = 16          # texts worked on at once: B
    block_size: int = 128         # characters that the model sees at most: T
    grad_accum: int = 1           # batches that are added up for each training step
    max_iters: int = 1920         # training steps in all
    n_embd: int = 128             # numbers that describe each character: C
    n_head: int = 4               # attention heads: H
    n_layer: int = 4              # layers on top of each other; with 0, there is no attention
    dropout: float = 0.05         # share of numbers turned off in training
    optimizer: str = "adamw"      # what moves the weights: adamw or muon
    learning_rate: float = 3e-3   # size of a training step at its largest
    weight_decay: float = 0.2     # how strongly weights are pulled to 0
    warmup_iters: int = 100       # steps in which the learning rate climbs
    grad_clip: float = 1.0        # limit for the size of all gradients together; 0: no limit
    eval_interval: int = 320      # steps from one evaluation to the next; each saves the model
    eval_iters: int = 20          # batches that an evaluation reads
    seed: int = 1337              # where the random numbers start
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    dtype: str = "float32"        # float32, or bfloat16: half the bits, faster on some machines
    compile: bool = False         # let torch.compile turn the model into faster code

    def __post_init__(self):
        check(self)  # in part two; a dataclass calls __post_init__ when it has been made


# -------------------------------- tokenizer and data --------------------------------------------
END = "\x03"    # ASCII's "end of text" comes after each document, so the model learns when to stop
UNK = "\ufffd"  # Unicode's replacement character stands for whatever is not in the vocabulary


class CharTokenizer:
    """Turns characters into token ids and back (in the course: an encoder and a decoder).
    The vocabulary is the sorted set of characters, with END and UNK. An id is a character's place
    in it. A vocabulary of characters is small, but texts become long; one of words is large, but
    texts become short. Subwords lie in between (byte-pair encoding, BPE, as in GPT-2).
    The course has two dictionaries, {char: id for id, char in enumerate(chars)} to encode, and
    {id: char for id, char in enumerate(chars)} to decode, for which chars[id] will do. To encode,
    we use an array, because it can be asked for a whole text at once. In Unicode, the table of all
    characters, "h" is number 104 and "i" is 105. code_to_id[[104, 105]] is an array of their ids.
    ValueError if there are more than 65,536 different characters, as ids have 16 bits."""

    def __init__(self, chars):
        different = set(chars) | {END, UNK}  # | is the union of two sets
        self.chars = "".join(sorted(different))
        self.vocab_size = len(self.chars)
        if self.vocab_size > 2**16:
            raise ValueError(f"{self.vocab_size:,} different characters are too many: the limit is "
                             f"{2**16:,} (prepare_owt.py --min_count makes rare ones unknown)")
        self.end = self.chars.index(END)
        self.unk = self.chars.index(UNK)
        # A place for each character of Unicode, all unknown at first. Then those that are known.
        places = sys.maxunicode + 1
        self.code_to_id = np.full(places, self.unk, np.uint16)
        for id, char in enumerate(self.chars):
            self.code_to_id[ord(char)] = id

    def encode(self, text):
        """str -> ids, an array of uint16. Characters outside the vocabulary become UNK."""
        return self.code_to_id[codes_of(text)]  # codes_of (in part two) makes 104, 105 of "hi"

    def decode(self, ids):
        """A list or an array of ids -> str."""
        return "".join(self.chars[id] for id in ids)


def load_data(config, chars=""):
    """Reads the corpus, the text to learn from -> ({"train": ids, "val": ids}, tokenizer).
    The first 90 % are to train on, the last 10 % to validate on. An exam needs questions that were
    not in the homework: if they were, learning by heart would look like learning.
    Without config.data, the text is the documentation that comes with Python.
    chars: the vocabulary of the model, if it has been trained before; a new one takes it from the
    text. Ids are arrays of uint16. ValueError if the corpus is too short or damaged, OSError if it
    cannot be read.
    (What matters here is the part behind "else". The functions that are called are in part two.)"""
    kind = kind_of(config.data)
    if kind == "prepared folder":
        splits, tokenizer = open_prepared(config.data)  # from prepare_owt.py: larger than memory
    elif kind == "pairs":
        splits, tokenizer = load_pairs(config, chars)   # questions with answers, for fine-tuning
    else:
        # A text is read in pieces, since it may be large: first for its characters, ...
        names = list_texts(config.data)
        found = set()
        for piece in read_documents(names):
            found.update(piece)
        tokenizer = tokenizer_for(found, chars)  # CharTokenizer(chars or found)
        # ... and then for their ids.
        ids = encode_pieces(read_documents(names), tokenizer)
        cut = int(0.9 * len(ids))
        splits = {"train": ids[:cut], "val": ids[cut:]}
    for name, ids in splits.items():
        if len(ids) <= config.block_size:  # a block and the character that follows must fit
            raise ValueError(f"{config.data}: too short: its {name} split has {len(ids):,} "
                             f"characters, and needs more than block_size, {config.block_size}")
    return splits, tokenizer


def get_batch(data, config, starts):
    """Blocks of text, and for each character the one that follows it: (x, y), int64 (B, T).
    A block of T characters holds T examples, one for each beginning: after "h" comes "e", after
    "he" comes "l". A batch is B blocks, stacked, because a GPU works on all of them at once. In
    training, starts are random places, so that a batch is a fair sample of the text.
    Both results are tensors, which are arrays of numbers with a shape, a type (dtype), and a device
    that holds them. Ids are int64, as PyTorch wants them. Types must agree: an error about
    Long and Float says that integers met decimal numbers. If shapes do not fit, print(x.shape) is
    the first thing to try.
    starts: B places in data, an array of integers."""
    length = config.block_size + 1
    blocks = [data[start : start + length] for start in starts]
    blocks = np.stack(blocks).astype(np.int64)  # (B, T + 1)
    blocks = torch.from_numpy(blocks)
    if config.device == "cuda":
        blocks = blocks.pin_memory()  # for speed: the GPU fetches them itself, while Python goes on
    blocks = blocks.to(config.device, non_blocking=True)
    x = blocks[:, :-1]                          # all but the last character of each block
    y = blocks[:, 1:]                           # all but the first
    return x, y


# -------------------------------- model ---------------------------------------------------------
class Head(nn.Module):
    """Self-attention: each character looks at those before it (Vaswani et al. 2017).
    Each character has three lists of D numbers. Its query says what it is looking for, its key what
    it contains, its value what it passes on. MultiHeadAttention, below, makes these lists with
    matrices that are learned, so nobody decides what the numbers mean. How well a query and a key
    fit is a score: their dot product (multiply number by number, then add up). The scores become
    shares, which add up to 1, and by these shares each character mixes the values of those that it
    sees. Older networks, called recurrent, read one character after the other. Here all characters
    look back at the same time, which is what GPUs are good at.
    All this together is a head. There are H of them, side by side, and one call does the work of
    all: q, k and v, the queries, keys and values, are (B, H, T, D). (The course has a module for
    each head, which computes the same, only more slowly.)
    nn.Module is what all parts of the model are made from. It knows the parameters inside it, so
    that they can be trained, moved to another device and saved all together. Calling a module, as
    in head(q, k, v), runs its forward."""

    def written_out(self, q, k, v):
        """What forward computes, step by step: to be read, and to be tried out with print."""
        T, D = q.shape[-2:]  # the last two sizes
        # The product of matrices, @, has the dot product of each row on its left with each column
        # on its right. The keys are rows, so transpose turns them into columns: (T, D) @ (D, T) is
        # (T, T), the score of each query with each key. The inner sizes, D and D, must agree. This
        # is done for each text and each head by itself.
        scores = q @ k.transpose(-2, -1)                          # (B, H, T, T)
        # A dot product is a sum of D numbers, positive and negative, which partly cancel. So sums
        # of 32 mostly lie between -6 and 6, sums of 10,000 between -100 and 100: they grow like
        # sqrt(D). With large scores, one character would get nearly the whole share.
        scores = scores / math.sqrt(D)
        # A character sees itself and those before it. What comes later is hidden, because the model
        # shall learn to predict it. tril keeps the lower triangle of a table of True. (The course
        # keeps this mask in a register_buffer: a tensor of a module that is not learned.)
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)          # ~ is "not"
        # Softmax makes shares of the scores in a row: e ** score, divided by the sum of all of
        # these. The share of a hidden character is e ** -inf, which is 0.
        shares = scores.softmax(dim=-1)                           # (B, H, T, T)
        # For each character: the values of all that it sees, each times its share, added up.
        return shares @ v                                         # (B, H, T, D)

    def forward(self, q, k, v):
        # PyTorch does all of this in one call, which is faster. is_causal means the mask. When the
        # model writes (see GPT.stream), it reads one new character at a time. This is a single
        # query, which may see all that came before, so there is no mask.
        single = q.shape[-2] == 1
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not single)


class MultiHeadAttention(nn.Module):
    """Several heads read the same text at the same time, like several readers of one book, each
    with questions of its own. What they find is joined and mixed. (B, T, C) -> (B, T, C).
    nn.Linear computes Wx + b, a matrix product and a sum; the numbers in W and b are learned.
    ValueError if the heads cannot share C evenly."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be divisible by n_head {config.n_head}")
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # no bias in the course
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads have found
        self.dropout = nn.Dropout(config.dropout)            # see FeedForward

    def forward(self, x, cache=None):
        B, T, C = x.shape
        H = self.n_head
        D = C // H
        # One product makes the queries, keys and values of all heads, side by side.
        q, k, v = self.qkv(x).split(C, dim=2)        # (B, T, 3 C) -> (B, T, C) each
        # view divides the C numbers of each character among the heads: if C is 6 and H is 2, six
        # numbers become two rows of three. transpose lets T and H change places, so that each head
        # has the whole text.
        q = q.view(B, T, H, D).transpose(1, 2)       # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)
        v = v.view(B, T, H, D).transpose(1, 2)
        # In training there is no cache. When the model writes, x is just the newest character, and
        # the keys and values of those before it are in the cache (GPT.stream says why they may stay
        # there). It is a dictionary with an entry for each such module: {module: (keys, values)}.
        if cache is not None:
            if self in cache:
                old_k, old_v = cache[self]
                k = torch.cat((old_k, k), dim=2)     # cat: one behind the other
                v = torch.cat((old_v, v), dim=2)
            cache[self] = (k, v)
        x = self.head(q, k, v)                       # (B, H, T, D)
        # Heads side by side again. (transpose only changes in which order memory is read, and view
        # needs the numbers in their order there. reshape copies them if they are not.)
        x = x.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.proj(x))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear: each character thinks about what it has seen. (B, T, C) -> (B, T, C),
    with 4 C in between, as is custom. A Sequential runs its modules one after the other.
    ReLU makes negative numbers 0. Without it, the two Linears could do no more than one alone,
    since A(Bx) = (AB)x, and AB is just another matrix. (Other such functions are sigmoid and
    tanh, which older networks used.) Dropout sets random activations, numbers on their way through
    the model, to 0 in training: so the model learns not to depend on any single one."""

    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 4 * config.n_embd),
                         nn.ReLU(),
                         nn.Linear(4 * config.n_embd, config.n_embd),
                         nn.Dropout(config.dropout))


class Block(nn.Module):
    """One layer of the model: attention, then feed-forward. (B, T, C) -> (B, T, C).
    What each of them finds is added to what was known before, which is called a residual: so
    nothing is forgotten on the way through many layers. A norm follows each sum. It shifts and
    scales the C numbers of each character, so that their mean is 0 and their variance 1: otherwise
    they would grow from sum to sum.
    The norm comes after the sum (post-norm), as in the course. GPT-2 puts it before attention and
    before feed-forward (pre-norm), which makes models of many layers easier to train.
    The first Transformer had two halves, to translate: an encoder read one language, a decoder
    wrote the other. This is the decoder alone."""

    def __init__(self, config):
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.feedforward = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.norm2 = nn.LayerNorm(config.n_embd)

    def forward(self, x, cache=None):
        x = self.norm1(x + self.attention(x, cache))
        x = self.norm2(x + self.feedforward(x))
        return x


class GPT(nn.Module):
    """The model: for each character of a text, it scores each character that could come next.
    An embedding is a table with a row of C numbers for each id: what the model knows of that
    character. Attention does not see where characters stand: after "ab" and after "ba", a character
    would find the same. So a second table has a row for each position. All these numbers are
    learned. (The first Transformer computed its rows of positions with sines.)"""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList()  # a list that nn.Module knows; it only holds its modules
        for _ in range(config.n_layer):
            self.blocks.append(Block(config))
        self.norm = nn.LayerNorm(config.n_embd)  # as in the course, though each block ends with one
        self.lm_head = nn.Linear(config.n_embd, vocab_size)  # lm: language model
        # All numbers in matrices and tables start at random, N(0, 0.02): with mean 0, and mostly
        # between -0.04 and 0.04. If they were equal, they would be changed alike and stay equal; if
        # they were large, what passes through the layers would grow and grow.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            # What is left are the scales of the norms, which PyTorch makes 1.

    def forward(self, index, targets=None, cache=None, start=0):
        """Ids -> (logits, loss). index and targets are the x and y of get_batch, int64 (B, T).
        Logits are scores, (B, T, V): softmax makes shares of them, the model's guesses. The loss
        measures how wrong they are: the mean of -ln(share of the character that came). That is 0
        for a share of 1, and grows as the share gets smaller. It is called cross-entropy, or
        negative log likelihood. Before training, scores are about equal, so each of V characters
        gets a share of 1/V, and the loss is -ln(1/V) = ln V: 4.38 for 80 characters. Without
        targets, it is None.
        (Mean squared error, another loss, is for predicting quantities.)
        cache and start, the position of the first character, are for stream, below. ValueError if
        a text is longer than block_size."""
        end = start + index.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} characters do not fit: block_size is {self.config.block_size}")
        # What is known of each character, plus what is known of its position, in each text the
        # same: (B, T, C) + (T, C).
        x = self.tokens(index) + self.positions.weight[start:end]
        for block in self.blocks:
            x = block(x, cache)
        logits = self.lm_head(self.norm(x))                        # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy wants all characters of the batch in one row: B * T of them. float() is for
        # dtype bfloat16: then logits have 16 bits, which are too few for the loss.
        scores = logits.flatten(0, 1).float()                      # (B*T, V)
        loss = nn.functional.cross_entropy(scores, targets.flatten())
        return logits, loss

    @torch.inference_mode()  # PyTorch need not remember how numbers were computed, as for training
    def stream(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """Continues a text: yields one new character after the other, (B, 1).
        index: the ids of the text, int64 (B, T), with T >= 1. temperature and top_k: see draw.
        First the whole text is read, then each time only the newest character. cache keeps the keys
        and values of those before it, and they stay valid: in every layer, a character sees only
        what comes before it, so nothing that is written later can change what it knows.
        The model sees block_size characters. When the text is longer, only its last half is kept.
        The first character of that half now has position 0. A key is made from a character and its
        position, so the old ones are wrong: cache is emptied, and the half is read again. This
        happens once in block_size / 2 characters."""
        index = index[:, -self.config.block_size:]            # crop to what the model can see
        cache = {}
        start = 0                                             # position of the first one to read
        for _ in range(max_new_tokens):
            unread = index[:, start:]
            logits, _ = self(unread, cache=cache, start=start)
            newest = draw(logits[:, -1], temperature, top_k)  # from the last position's scores
            yield newest                                      # hands it out, and goes on from here
            start = index.shape[1]                            # after "hel" was read: 3
            index = torch.cat((index, newest), dim=1)
            if index.shape[1] > self.config.block_size:       # too long
                half = max(1, self.config.block_size // 2)
                index = index[:, -half:]
                cache = {}
                start = 0

    def generate(self, index, max_new_tokens, temperature=1.0, top_k=None):
        """The text with its continuation, (B, T + max_new_tokens). See stream."""
        pieces = [index]
        for newest in self.stream(index, max_new_tokens, temperature, top_k):
            pieces.append(newest)
        return torch.cat(pieces, dim=1)


def draw(logits, temperature=1.0, top_k=None):
    """Scores (B, V) -> the id of one character for each text, int64 (B, 1).
    A temperature below 1 makes likely characters likelier, and 0 always takes the likeliest; one
    above 1 gives unlikely ones a chance. top_k allows only the k likeliest."""
    if temperature < 1e-6:  # dividing by it would fail
        return logits.argmax(dim=-1, keepdim=True)
    shares = (logits.float() / temperature).softmax(dim=-1)
    if top_k:
        # The ids from the likeliest to the least likely. (stable: equal ones keep their order.)
        ids = shares.argsort(dim=-1, descending=True, stable=True)
        others = ids[:, top_k:]
        shares = shares.scatter(-1, others, 0.0)  # writes 0.0 in the places of the others
    # Draws one id, each with the chance that its share says. (They need not add up to 1.)
    return torch.multinomial(shares, 1)


# -------------------------------- learning ------------------------------------------------------
def autocast(config):
    """For dtype bfloat16: inside "with autocast(config):", matrix products use 16 bits for a number
    instead of 32, which is faster where the processor has instructions for it."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()  # an older inference_mode, which the course uses
def estimate_loss(model, splits, config):
    """The mean loss of each split, over eval_iters batches: {"train": float, "val": float}.
    The batches are spread evenly over the split, and are the same every time, so that evaluations
    can be compared. eval() switches dropout off, train(True) on again.
    While the model learns, both losses fall. If only train falls and val rises, it learns by heart,
    which is called overfitting. More text, more dropout, a smaller model or fewer steps help, and
    train, in part two, keeps the weights with the lowest val."""
    was_training = model.training
    model.eval()
    means = {}
    for name, data in splits.items():
        # As many places as there will be blocks, from the first one to the last that fits.
        last = len(data) - config.block_size - 1
        places = np.linspace(0, last, config.eval_iters * config.batch_size, dtype=np.int64)
        losses = []
        for starts in places.reshape(config.eval_iters, config.batch_size):  # a row for each batch
            x, y = get_batch(data, config, starts)
            with autocast(config):
                _, loss = model(x, y)
            losses.append(loss.item())  # item: a tensor of one number -> that number
        means[name] = sum(losses) / len(losses)
    model.train(was_training)
    return means


def make_optimizers(model, config):
    """What moves the weights (another word for parameters): a list, [AdamW] or [AdamW, Muon].
    The gradient of a weight says how much the loss grows if that weight grows a little. So each
    weight is moved the other way, which is called gradient descent. Adam (Kingma and Ba 2014) keeps
    two averages for each weight:
        average = 0.9 * average + 0.1 * gradient         (momentum, against the noise of batches)
        square = 0.99 * square + 0.01 * gradient ** 2    (from an older optimizer, RMSprop)
        weight = weight - learning_rate * average / sqrt(square)
    If a gradient is always 5, average becomes 5 and square 25, so the weight is moved by
    learning_rate * 5 / 5. If it is always 0.005, that is learning_rate * 0.005 / 0.005, which is
    the same: weights with small gradients learn as fast as others. The W (Loshchilov and Hutter
    2017) is for weight decay: each step also makes all matrices a little smaller. To know texts by
    heart, a model has to react strongly to tiny differences, and that takes large weights."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # few numbers, which need no decay
    muon = []
    if config.optimizer == "muon":  # an option, for the matrices in the blocks: see part two
        inside = set(model.blocks.parameters())
        muon = [Muon([p for p in matrices if p in inside], config)]
        matrices = [p for p in matrices if p not in inside]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # betas: the two numbers above. fused: all weights in one call, which is faster.
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.99), fused=True)
    return [adamw] + muon


def learning_rate(step, config):
    """How far a step moves the weights. If it is too far, they overshoot; if it is too short,
    learning takes for ever. The rate climbs during the first steps (warm-up), while the averages of
    AdamW are still mostly noise, and then falls in a line to 0, so that the weights settle.
    To find a good rate, try some, each 3 times the last, and compare the losses."""
    warmup = min(config.warmup_iters, config.max_iters // 2)  # in a short run, half of it
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share_left = (config.max_iters - step) / (config.max_iters - warmup)  # falls from 1 to 0
    return config.learning_rate * share_left


def training_step(model, optimizers, batches, config, step):
    """One step of training: forward, backward, step. Returns the mean loss.
    backward finds the gradients of all weights, and leaves each in weight.grad. It goes through the
    computation from the loss back to the first layer, by the chain rule: if a score grows by 2 when
    a weight grows by 1, and the loss by 3 when the score grows by 1, then the gradient is 2 * 3.
    batches: a list of (seed for dropout, x, y). If there is more than one, their gradients add up:
    this is gradient accumulation, for a batch that is too large for the memory."""
    total = 0.0
    for seed, x, y in batches:
        torch.manual_seed(seed)  # for dropout: so a killed run can repeat its last steps exactly
        with autocast(config):
            _, loss = model(x, y)
        loss = loss / len(batches)  # so that they add up to the mean, as in one large batch
        loss.backward()
        total += loss.detach()  # detach: only the number, without what backward needs
    average_gradients(model)  # when several processes train: see part two
    # One odd batch must not throw the weights far. The norm of the gradients is the square root of
    # the sum of their squares. If it is above grad_clip, all of them are scaled down to that.
    if config.grad_clip > 0:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    rate = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:  # the groups of make_optimizers, in which
            group["lr"] = rate                # PyTorch keeps the learning rate, too
        optimizer.step()  # moves the weights
        # backward adds to the gradients that are there. So they are removed, here or anywhere else
        # before the next backward.
        optimizer.zero_grad()
    return total


def learn(model, splits, config):
    """The whole of training: again and again a batch and a step, now and then a look at the losses.
    (python gpt.py runs train, in part two, which does the same and saves its work.)"""
    optimizers = make_optimizers(model, config)
    data = splits["train"]
    for step in range(config.max_iters):
        if step % config.eval_interval == 0:
            print(step, estimate_loss(model, splits, config))
        starts = np.random.randint(len(data) - config.block_size, size=config.batch_size)
        x, y = get_batch(data, config, starts)
        batch = (step, x, y)  # the step serves as the seed for dropout
        training_step(model, optimizers, [batch], config, step)


# Here the lesson ends: this is all that a GPT is, and how it learns. A first reading may stop here.
# ================================ Part two: the craft ===========================================
# This part keeps a run safe and makes it fast. It goes from the whole to its parts: first a run,
# then what a run is made of, so that a reader may stop after any section.

# Most runs are a single process: then RANK is 0 and WORLD is 1. But one process can use only one
# GPU. For more, PyTorch's program torchrun starts WORLD processes that train one model together, on
# one machine or several. RANK is the number of a process, LOCAL_RANK that on its own machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
STOP = []  # ask_to_stop puts a signal into this list, such as Ctrl-C, to make the program end


# -------------------------------- a run ---------------------------------------------------------
def train(**settings):
    """Trains a model and returns it, with its best weights. train(data="book.txt", max_iters=500)
    does what python gpt.py --data book.txt --max_iters 500 does.
    Each evaluation saves the run in a file, the checkpoint. If that file exists already, the run
    carries on from there. So a run that was killed loses the steps since its last evaluation, and
    repeats them when it is started again. On a CPU, it ends with exactly the same weights as if it
    had never been killed, since all its random numbers follow from the seed and the step.
    A user's mistake raises ValueError, OSError or MemoryError with a message of one line."""
    join_processes()
    config, saved, carries_on = choose_settings(settings)
    try:
        run = Run(config, saved, carries_on)
        run.introduce()
        do_steps(run)
        run.model.load_state_dict(run.best)  # copies the best weights into the model
        run.report()
    except (RuntimeError, MemoryError) as error:
        explain(error, config)  # raises a clearer one, if it can
        raise
    return run.model.eval()


def do_steps(run):
    """The loop, with a bar that shows how far it has come (tqdm)."""
    config = run.config
    if run.step >= config.max_iters and not run.evaluation_is_due():
        return  # there is nothing left to do
    characters = config.batch_size * config.grad_accum * config.block_size  # in each step
    # The bar counts steps and shows characters (unit_scale), but only in a terminal (disable=None).
    with tqdm(total=config.max_iters, initial=run.step, unit="char", unit_scale=characters,
              dynamic_ncols=True, file=sys.stdout, disable=None) as bar:
        while run.step < config.max_iters:
            if run.evaluation_is_due():
                run.evaluate()
            batches = list(draw_batches(run.splits["train"], config, run.step))
            # fast_model is run.model, or faster code for it, which uses the same weights.
            loss = training_step(run.fast_model, run.optimizers, batches, config, run.step)
            run.step += 1
            if STOP:  # Ctrl-C: the weights as they are now are saved
                run.save()
                return
            bar.update()
            if run.step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        if run.evaluation_is_due():  # after the last step
            run.evaluate()


def draw_batches(data, config, step):
    """Yields the batches of a step: (seed for dropout, x, y). If there are two processes and four
    batches, process 0 takes numbers 0 and 2, and process 1 takes 1 and 3. All that is random
    follows from the run's seed and the step: it is the same when a step is repeated, and however
    many processes there are."""
    rng = np.random.default_rng((config.seed, step))  # random numbers that follow from both
    size = (config.grad_accum, config.batch_size)
    starts = rng.integers(0, len(data) - config.block_size, size)  # a row for each batch
    seeds = rng.integers(0, 2**62, config.grad_accum)
    for number in range(RANK, config.grad_accum, WORLD):  # from RANK on, every WORLD-th
        x, y = get_batch(data, config, starts[number])
        yield int(seeds[number]), x, y


class Run:
    """A run of training: what it is made of, and how it is evaluated, saved and reported.
    saved is what a checkpoint holds. A run that carries on takes all of it, and one that fine-tunes
    takes the weights. For a run from the beginning, saved is {}."""

    def __init__(self, config, saved, carries_on):
        self.config = config
        self.is_new = not carries_on  # nothing has been saved yet
        self.splits, self.tokenizer = load_data(config, saved.get("chars", ""))
        self.corpus = fingerprint(self.splits)  # to know the text again when it carries on
        # A prepared folder has a vocabulary of its own. If it is not the model's, ids do not fit.
        if saved and self.tokenizer.chars != saved["chars"]:
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
        """True every eval_interval steps and at the end, unless this step has been evaluated."""
        regular = self.step % self.config.eval_interval == 0
        last = self.step == self.config.max_iters
        return (regular or last) and self.step not in self.losses

    def evaluate(self):
        """Estimates the losses, saves, and prints a line that ends with what the model writes."""
        losses = estimate_loss(self.model, self.splits, self.config)
        self.losses[self.step] = losses
        self.save()
        words = sample(self.model, self.tokenizer, 36).split()
        text = " ".join(words)  # on one line, which fits into a terminal
        numbers = f"train {losses['train']:.4f}   val {losses['val']:.4f}"
        tqdm.write(f"step {self.step:6,d}   {numbers}   {text}")

    def best_step(self):
        """The step with the best weights: the one with the lowest val, except step 0, where nothing
        was learned yet; or else the latest step. For pairs it is always the latest: here the model
        is to learn answers by heart, and val is about answers that it was never told."""
        vals = {step: losses["val"] for step, losses in self.losses.items() if step > 0}
        if kind_of(self.config.data) == "pairs" or not vals:
            return self.step
        return min(vals, key=vals.get)  # the step whose val is the lowest

    def save(self):
        """Writes the checkpoint: all that the run needs to carry on. ValueError if a weight is no
        longer a number: saving it would ruin the file. OSError if the file cannot be written, or if
        it is another run's."""
        config = self.config
        weights = self.model.state_dict()
        if not are_finite(weights):
            raise ValueError(f"step {self.step}: a weight is no longer a number, so this was not "
                             "saved: lower --learning_rate")
        if self.best_step() == self.step:
            # Copies, since the next steps change the weights themselves.
            self.best = {name: tensor.clone() for name, tensor in weights.items()}
        if RANK > 0:  # only process 0 writes
            return
        if self.is_new and os.path.exists(config.out):
            raise OSError(f"{config.out} was made by another run since this one began, so it is "
                          "left alone: name another --out")
        # What each optimizer remembers, such as AdamW's averages. Its settings are in config.
        kept = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        save_checkpoint(config.out, dict(
            config=asdict(config), chars=self.tokenizer.chars, corpus=self.corpus,
            python=platform.python_version(), step=self.step, losses=self.losses, model=weights,
            best=self.best, optimizer=kept))
        self.is_new = False

    def introduce(self):
        """The first lines: what is trained, and on what."""
        config = self.config
        kind = kind_of(config.data)
        if kind != "pairs":  # for pairs, load_pairs has said more
            name = config.data or "built in"
            count = len(self.splits["train"]) + len(self.splits["val"])
            different = self.tokenizer.vocab_size
            print(f"corpus  {name}: {kind}, {count:,} characters, {different:,} different ones")
        device = config.device
        if device == "cuda":
            device = torch.cuda.get_device_name()
        count = sum(p.numel() for p in self.model.parameters())
        place = f"at step {self.step:,} of {config.max_iters:,}, on {device} in {config.dtype}"
        print(f"model   {config.out}: {count:,} parameters, {place}")
        if config.compile and self.step < config.max_iters:
            print("the first step compiles, which can take a minute")

    def report(self):
        """The last lines: how it went, and what to do next."""
        config = self.config
        if config.device == "cuda":
            gib = torch.cuda.max_memory_allocated() / 2**30
            print(f"memory  {gib:.2f} GiB of the GPU at most")
        print(sample(self.model, self.tokenizer, 500))
        if self.step < config.max_iters:
            print(f"\nstopped at step {self.step:,}; the same command carries on")
        else:
            print(f"\nfinished at step {self.step:,}; for more, raise --max_iters")
        best = self.best_step()
        if best in self.losses:
            val = self.losses[best]["val"]
            print(f"kept    the weights of step {best:,}, val {val:.4f}")
        print(f"talk to it: python chat.py --model {shlex.quote(config.out)}")


# -------------------------------- settings ------------------------------------------------------
# Where a setting comes from, if no flag says it, and whether a flag may change it:
#                       in a run that carries on        in fine-tuning
#   ARCHITECTURE        from the checkpoint, fixed      from the checkpoint, fixed
#   OF_THE_MACHINE      the default                     the default
#   FREE                from the checkpoint             the default
#   all others          from the checkpoint, fixed      the default
ARCHITECTURE = ("block_size", "n_embd", "n_head", "n_layer")
OF_THE_MACHINE = ("out", "device", "dtype", "compile")
FREE = ("data", "max_iters", "eval_interval", "eval_iters")  # data: another path to the same text
CHOICES = {"optimizer": ("adamw", "muon"),
           "device": ("cpu", "cuda", "mps"),
           "dtype": ("float32", "bfloat16")}
# The lowest and the highest value of a number, where these are not 1 and 2**31.
LIMITS = {"max_iters": (0, 2**31), "warmup_iters": (0, 2**31), "seed": (0, 2**31),
          "n_layer": (0, 1000), "dropout": (0, 0.99), "learning_rate": (0, 1000),
          "weight_decay": (0, 1000), "grad_clip": (0, 2**31)}


def check(config):
    """A mistake in a setting is better found now than after an hour: ValueError names it."""
    for field in fields(config):  # a field of a dataclass has a name, a type and more
        name = field.name
        value = getattr(config, name)
        if field.type is float and type(value) is int:
            value = float(value)  # 1 passes for 1.0
        if type(value) is not field.type:
            kind = field.type.__name__
            raise ValueError(f"{name} must be of type {kind}, not {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            choices = " or ".join(CHOICES[name])
            raise ValueError(f"{name} must be {choices}, not {value!r}")
        if field.type in (int, float):
            lowest, highest = LIMITS.get(name, (1, 2**31))
            if not lowest <= value <= highest:
                raise ValueError(f"{name} must be from {lowest} to {highest}, not {value}")


def defaults_for(device):
    """The values in Config are for a CPU. A GPU can train a larger model: {name: value}."""
    if device != "cuda":
        return {}
    settings = dict(batch_size=64, block_size=256, n_embd=384, n_head=8, n_layer=8, dropout=0.3,
                    weight_decay=0.5, learning_rate=2e-3, warmup_iters=200, max_iters=600,
                    eval_interval=100, eval_iters=20)
    # Older GPUs have no bfloat16. PyTorch can emulate it there, but that is slow.
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        settings["dtype"] = "bfloat16"
    # torch.compile needs a C compiler, which is rare on Windows. CC may hold the name of one.
    name = os.environ.get("CC", "cc")
    found = shutil.which(name) is not None
    settings["compile"] = sys.platform == "linux" and found
    return settings


def choose_settings(given):
    """given, {name: value}: what the user asked for -> (config, saved, carries_on).
    If the file out exists, the run carries on, and saved is what the file holds. Otherwise it is
    what the file init_from holds, or {} for a run from the beginning."""
    config = Config(**given)  # a first one, to know which files and which device are meant
    out = config.out
    if not out:
        source = os.path.abspath(config.data or "model")  # so that the folder "." has a name, too
        out = Path(source).stem + ".pkl"                  # book.txt gives book.pkl
    folder = os.path.dirname(os.path.realpath(out))  # realpath: out may be a link to a file
    if RANK == 0 and not os.path.isdir(folder):  # only process 0 will save
        raise ValueError(f"{out} cannot be saved: there is no folder {folder}")
    saved = find_checkpoint(out)
    carries_on = bool(saved)
    path = out
    taken_over = ()  # the names of the settings that come from the checkpoint
    if carries_on:
        taken_over = [name for name in saved["config"] if name not in OF_THE_MACHINE]
    elif config.init_from:
        path = config.init_from
        saved = find_checkpoint(path)
        taken_over = ARCHITECTURE
        if not saved:
            raise ValueError(f"{path}: no such file")
    settings = defaults_for(config.device)
    for name in taken_over:
        settings[name] = saved["config"][name]
    settings.update(given)  # and these replace the others
    settings["out"] = out
    config = Config(**settings)
    refuse_changes(path, saved, config, taken_over)
    if config.grad_accum % WORLD:
        raise ValueError(f"grad_accum {config.grad_accum} must be divisible by {WORLD} processes")
    return config, saved, carries_on


def refuse_changes(path, saved, config, taken_over):
    """No flag may be ignored in silence, and none may spoil a trained model: ValueError names the
    settings that must stay as they are in the checkpoint."""
    if not saved:
        return
    before = saved["config"]
    after = asdict(config)
    free = FREE
    texts_before = before["batch_size"] * before["grad_accum"]
    texts_after = after["batch_size"] * after["grad_accum"]
    if texts_before == texts_after:  # such as 16 * 1 and 8 * 2: a step reads the same texts
        free = FREE + ("batch_size", "grad_accum")
    changes = []
    for name in taken_over:
        if before[name] != after[name] and name not in free:
            changes.append(f"{name} {before[name]!r}, not {after[name]!r}")
    if changes:
        advice = f"start a new run with another --out (and --init_from {path} for its weights)"
        if taken_over == ARCHITECTURE:
            advice = "train a new model, without --init_from"
        listed = "; ".join(changes)
        raise ValueError(f"{path} was trained with {listed}: drop the flag, or {advice}")


def find_checkpoint(path):
    """What the file holds, or {} if there is none. Of several processes, the first one reads it and
    sends it to the others, which may run on other machines."""
    saved = {}
    if RANK == 0 and os.path.exists(path):
        saved = load_checkpoint(path)
    if WORLD > 1:
        parcel = [saved]  # process 0 sends what is in this list, and the others get it into theirs
        torch.distributed.broadcast_object_list(parcel, device=torch.device("cpu"))
        saved = parcel[0]
    return saved


# -------------------------------- checkpoints ---------------------------------------------------
def save_checkpoint(path, checkpoint):
    """Writes a dictionary to a file. It writes a new file beside the old one and renames it in the
    end: killed at any moment, it leaves the old file or the new one, but never half of one.
    OSError if it failed, for example because the disk is full; then the old file is untouched."""
    path = Path(os.path.realpath(path))  # if it is a link, the file that it points to
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # model.pkl.4711.tmp in process 4711
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()             # from Python to the system,
            os.fsync(file.fileno())  # and from the system to the disk
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not saved, the file is as it was: {error}")


def load_checkpoint(path):
    """Reads what save_checkpoint wrote, onto the CPU.
    torch.save writes a pickle, Python's format for objects, with the tensors beside it in a zip.
    Reading a pickle can run any code that its author put there. With weights_only=True it cannot:
    only tensors and plain values are made. So the checkpoints of strangers are safe.
    ValueError if the file is no checkpoint, or damaged; OSError if it cannot be read."""
    with open(path, "rb") as file:
        try:
            check_parts(file)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's long words about some foreign files
                saved = torch.load(path, map_location="cpu", weights_only=True)
            known = asdict(Config())
            same_version = saved["config"].keys() == known.keys()
            if same_version:
                check_weights(saved)
        except Exception as error:  # whatever went wrong, a user needs to know only this:
            if is_out_of_memory(error):
                raise ValueError(f"{path} does not fit in memory")
            raise ValueError(f"{path} is no checkpoint of gpt.py, or it is damaged")
    if not same_version:  # not inside of try, where it would get the message above
        raise ValueError(f"{path} was made by another version of gpt.py, with other settings")
    return saved


def check_parts(file):
    """A zip is made of parts. For each it has a checksum, a number that is computed from the part
    and no longer fits it if the part is damaged. torch.load does not look at it, so a damaged
    weight would pass for a good one."""
    with zipfile.ZipFile(file) as parts:
        damaged = parts.testzip()
        # No checksum covers these: damage here can make a part look like a folder. They must be 0.
        attributes = [part.external_attr for part in parts.infolist()]
    if damaged or any(attributes):
        raise ValueError("damaged")


def check_weights(saved):
    """Raises an error, of whatever kind, if something is missing, or if the weights do not fit the
    model that the settings describe. That model is made on the device meta, where tensors have
    shapes but no numbers: so it takes no memory, whatever size the file says."""
    missing = {"corpus", "step", "losses", "optimizer"} - set(saved)
    if missing:
        raise ValueError("incomplete")
    tokenizer = CharTokenizer(saved["chars"])
    if tokenizer.chars != saved["chars"]:  # not sorted, or without END
        raise ValueError("no vocabulary")
    with torch.device("meta"):
        model = GPT(Config(**saved["config"]), tokenizer.vocab_size)
    expected = model.state_dict()
    for weights in (saved["model"], saved["best"]):
        if weights.keys() != expected.keys() or not are_finite(weights):
            raise ValueError("other weights")
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(name)


def are_finite(weights):
    """False if a number in {name: tensor} is infinite or nan, "not a number"."""
    for tensor in weights.values():
        if not tensor.isfinite().all():
            return False
    return True


def restore(optimizers, states, path):
    """Gives optimizers back what they remember of each weight, as AdamW its two averages.
    states: for each optimizer, what it remembers of weight 0, 1 and so on: {0: {name: tensor}, ...}
    ValueError if the sizes do not fit: PyTorch does not look at them here, but relies on them."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            whole = optimizer.state_dict()  # its settings ("param_groups") and its "state"
            whole["state"] = state
            optimizer.load_state_dict(whole)
            for weight, kept in optimizer.state.items():  # {weight: {name: tensor}, ...}
                check_kept(kept, weight)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: what its optimizer kept does not fit the model: {error}")


def check_kept(kept, weight):
    """kept: {name: tensor}. "step", which counts steps, is a single number; all else has the
    weight's shape, with the numbers next to each other in memory (contiguous)."""
    for name, tensor in kept.items():
        shape = weight.shape
        if name == "step":
            shape = ()  # a single number has no dimensions
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(name)


def load_model(path, device="cpu"):
    """A checkpoint -> (model with its best weights, in eval mode; tokenizer).
    ValueError if the file is no checkpoint or the device is not there, OSError if it is missing."""
    saved = load_checkpoint(path)
    saved["config"].update(device=device, dtype="float32")
    config = Config(**saved["config"])
    prepare_device(config)  # ValueError if it is not there
    tokenizer = CharTokenizer(saved["chars"])
    model = GPT(config, tokenizer.vocab_size)
    model.load_state_dict(saved["best"])
    return model.to(device).eval(), tokenizer


# -------------------------------- reading texts -------------------------------------------------
def kind_of(path):
    """What --data names."""
    if not path:
        return "Python's documentation"
    if Path(path, "vocab.json").exists():
        return "prepared folder"
    if os.path.isdir(path):
        return "folder of texts"
    if path.lower().endswith((".jsonl", ".ndjson", ".json")):
        return "pairs"
    return "text"


def list_texts(path):
    """The files that make up a corpus: all .txt files in a folder and in its folders, or the one
    file that path names. For the built-in text, the list is empty."""
    if not path:
        return []
    if not os.path.isdir(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no file: save the text in one, as it is read twice")
        return [path]
    texts = []
    others = 0
    for file in files_in(path):
        if file.name.startswith("._"):  # macOS writes such files beside others
            continue
        if file.suffix.lower() == ".txt" and file.is_file():
            texts.append(file)
        else:
            others += 1
    if not texts:
        raise ValueError(f"{path}: neither .txt files nor the vocab.json of prepare_owt.py")
    if others > 0:
        print(f"{path}: {others:,} files are no .txt and are not read")
    return texts


def files_in(folder):
    """All files in a folder and in its folders, sorted. A link to a folder counts as a file.
    OSError for a folder that may not be read: Path.rglob would leave it out without a word."""
    def fail(error):
        raise error
    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in folders + names:
            path = Path(parent, name)
            if path.is_symlink() or not path.is_dir():
                found.append(path)
    return sorted(found)


def read_documents(names):
    """Yields the texts of list_texts in pieces, with END behind each."""
    if not names:
        from pydoc_data.topics import topics  # a dictionary of texts that comes with Python
        for text in topics.values():
            yield clean(text) + END
    for name in names:
        for piece in read_text(name):
            yield piece
        yield END


# What shows that a file is no text: a NUL, or a byte that cannot be decoded. Such a byte, say 0xE9,
# is read as the code U+DCE9 (errors="surrogateescape"), and no text has these codes.
NOT_TEXT = re.compile("[\\0\udc80-\udcff]")


def read_text(path):
    """Yields a text file in pieces of about a million characters. Python turns all kinds of line
    ends into "\\n". ValueError names the first line that is not text."""
    line = 1
    with open(path, "rb") as file:
        encoding = encoding_of(file.peek(2))  # peek: look at the first bytes, and leave them there
        text = io.TextIOWrapper(file, encoding, errors="surrogateescape")
        try:
            while piece := text.read(2**20):  # := assigns; what is assigned is empty at the end
                bad = NOT_TEXT.search(piece)
                if bad:
                    line += piece.count("\n", 0, bad.start())
                    raise ValueError(f"{path}, line {line:,}: this is not text; save it as UTF-8, "
                                     "or use prepare_owt.py for an archive")
                line += piece.count("\n")
                yield piece.replace(END, UNK)  # see clean
        except UnicodeDecodeError as error:  # damaged UTF-16 ends up here
            raise ValueError(f"{path}, from line {line:,} on: {error}")


def encoding_of(data):
    """The encoding of a text that begins with these bytes: UTF-16 if it begins with UTF-16's
    byte-order mark, as some programs on Windows write it, else UTF-8. Python removes the mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


def clean(text):
    """What read_text does to a text, for one that is in memory already: all lines end with "\\n",
    and an END inside a text becomes UNK, because END means that the text is over."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace(END, UNK)


def codes_of(text):
    """A text -> the number of each character in Unicode, an array of uint32: "hi" is 104, 105.
    It does what [ord(char) for char in text] does, only faster."""
    # UTF-32 has 4 bytes for each number, as has an array of uint32. (surrogatepass: no error,
    # whatever is in the text.)
    data = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(data, np.uint32)


def tokenizer_for(found, chars):
    """The tokenizer for a text in which these characters were found. If chars is not empty, it is
    the vocabulary of a model, which reads all other characters as UNK. This prints some of them."""
    unknown = sorted(set(found) - set(chars))
    if chars and unknown:
        share = f"{len(unknown):,} of {len(found):,} different characters"
        some = printable(" ".join(unknown[:20]))
        print(f"unknown {share}, which the model cannot tell apart: {some}")
    return CharTokenizer(chars or found)


def encode_pieces(pieces, tokenizer):
    """A text that comes in pieces -> its ids. So only the ids and one piece are in memory."""
    ids = bytearray()  # can grow, which an array cannot
    for piece in pieces:
        ids += tokenizer.encode(piece).tobytes()
    return np.frombuffer(ids, np.uint16)


# The names that data sets use: OpenOrca has question and response, Alpaca instruction and output.
# Alpaca's input, if there is one, belongs to the prompt.
PROMPTS = ("prompt", "question", "instruction")
INPUT = "input"
ANSWERS = ("completion", "answer", "response", "output")


def load_pairs(config, chars):
    """Pairs of prompt and answer -> (splits, tokenizer). A tenth of them is kept back, for val.
    In each split, the pairs are shuffled and written one after the other, and this is repeated
    until there are a million characters: if they were always in the same order, the model would
    learn which question follows which."""
    pairs = read_pairs(config.data)
    cut = int(0.9 * len(pairs))
    counts = f"{cut:,} to train on and {len(pairs) - cut:,} kept back"
    too_long = [pair for pair in pairs if len(pair) > config.block_size]
    print(f"corpus  {config.data}: pairs, {counts}; {len(too_long):,} are longer than block_size")
    tokenizer = tokenizer_for(set("".join(pairs)), chars)
    rng = random.Random(config.seed)
    splits = {}
    for name, part in (("train", pairs[:cut]), ("val", pairs[cut:])):
        once = sum(len(pair) for pair in part)  # characters; not 0, as a pair has at least an END
        rounds = math.ceil(1e6 / once)
        pieces = []
        for _ in range(rounds):
            rng.shuffle(part)
            pieces += part
        splits[name] = encode_pieces(pieces, tokenizer)
    return splits, tokenizer


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
        raise ValueError(f"{path}: at least two pairs are needed, to train and to validate")
    return pairs


def parse_pair(line):
    """A line of read_pairs -> its text. ValueError says what is wrong with it."""
    try:
        pair = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or lists in lists in lists ...
        pair = None
    if not isinstance(pair, dict):
        raise ValueError(f"this is no JSON object, one for each pair: {line[:60]}")
    prompts = [name for name in PROMPTS if name in pair]
    answers = [name for name in ANSWERS if name in pair]
    if not prompts or not answers:
        found = ", ".join(pair) or "none"
        raise ValueError(f"no prompt and completion; its names are: {found}")
    names = [prompts[0], answers[0]]
    if pair.get(INPUT) not in (None, ""):
        names.insert(1, INPUT)
    for name in names:
        if not isinstance(pair[name], str):
            raise ValueError(f"{name} must be a text, not {pair[name]!r}")
    text = "\n".join(pair[name] for name in names)
    return clean(text) + END


def open_prepared(folder):
    """The folder of prepare_owt.py -> (splits, tokenizer). np.memmap is an array that stays on the
    disk: only what is used is read, so that a corpus may be larger than the memory.
    corpus.json says what the other files must be like. ValueError if they are not: with another
    vocabulary, for example, the model would learn nonsense."""
    folder = Path(folder)
    splits = {}
    try:
        corpus = json.loads((folder / "corpus.json").read_bytes())
        vocabulary = (folder / "vocab.json").read_bytes()
        for name in ("train", "val"):
            splits[name] = np.memmap(folder / f"{name}.bin", np.uint16, "r")  # r: read only
        found = [zlib.crc32(vocabulary), len(splits["train"]), len(splits["val"])]
        if found != [corpus["checksum"], corpus["train"], corpus["val"]]:
            raise ValueError("other files")
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{folder}: its files are damaged or do not belong together; run "
                         "prepare_owt.py again")
    return splits, CharTokenizer(json.loads(vocabulary))


def fingerprint(splits):
    """What identifies a text: {name of a split: [length, checksum]}. So a run that carries on knows
    its text again. The checksum is that of 1,000 pieces, evenly spread, as reading all of
    OpenWebText would take minutes."""
    found = {}
    for name, ids in splits.items():
        checksum = 0
        for start in np.linspace(0, len(ids), 1000, endpoint=False, dtype=np.int64):
            checksum = zlib.crc32(ids[start : start + 2**14], checksum)  # of all pieces so far
        found[name] = [len(ids), checksum]
    return found


# -------------------------------- devices and processes -----------------------------------------
def build(config, vocab_size):
    """Makes a new model on its device: (model, optimizers, fast_model).
    fast_model is the same model with the same weights, turned into faster code by torch.compile, or
    just the model, if config.compile is off."""
    prepare_device(config)
    torch.manual_seed(config.seed)
    model = GPT(config, vocab_size).to(config.device)
    optimizers = make_optimizers(model, config)
    fast_model = model
    if config.compile:
        mode = "default"
        # In this mode, the GPU records all that it does for a batch, and then repeats it, which is
        # faster than to be told each time (a CUDA graph). A recording always writes to the same
        # memory, so a second batch would overwrite the gradients of the first.
        if config.device == "cuda" and config.grad_accum == 1:
            mode = "reduce-overhead"
        fast_model = torch.compile(model, mode=mode)
    return model, optimizers, fast_model


def prepare_device(config):
    """ValueError if the device is missing. Sets a GPU up for speed.
    A CPU has few fast cores, a GPU thousands of slow ones, which suits matrix products. CUDA is how
    NVIDIA's GPUs are programmed. .to(device) moves tensors, and those that are used together must
    be on the same device.
    (A GPU adds up numbers in the order in which its threads finish, so that the last digits differ
    from run to run. The README says how to make them equal.)"""
    module = getattr(torch, config.device)  # torch.cuda, torch.cpu or torch.mps
    if not module.is_available():
        raise ValueError(f"device {config.device}: this machine, or its torch, has none")
    if config.device != "cuda":
        return
    if LOCAL_RANK >= torch.cuda.device_count():
        raise ValueError(f"process {LOCAL_RANK + 1} of this machine has no GPU: there are "
                         f"{torch.cuda.device_count()}, so lower --nproc_per_node")
    torch.cuda.set_device(LOCAL_RANK)
    torch.set_float32_matmul_precision("high")  # below "highest": fewer digits, but far faster
    # PyTorch has several ways to compute attention (sdp). That of NVIDIA's library cuDNN has to get
    # ready for each length of text, which takes long when each character makes a new length.
    torch.backends.cuda.enable_cudnn_sdp(False)


def join_processes():
    """Connects the processes of torchrun, so that they can send each other tensors. nccl does this
    between GPUs, and gloo between CPUs. Process 0 alone prints, or each line would come WORLD
    times."""
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    backends = "gloo"
    if torch.cuda.is_available():
        backends = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backends)
    atexit.register(torch.distributed.destroy_process_group)  # to be called when Python ends
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # print writes to nowhere


def average_gradients(model):
    """Several processes that train one model have different batches, hence different gradients.
    They send each other their gradients, once a step and as one long vector. All take the mean, so
    all move their weights in the same way and stay equal."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    vector = nn.utils.parameters_to_vector(gradients)
    torch.distributed.all_reduce(vector)  # vector is now the sum of the vectors of all processes
    vector /= WORLD
    nn.utils.vector_to_parameters(vector, gradients)  # writes its numbers into the gradients


def is_out_of_memory(error):
    """Whether an error says that the memory is full: Python's, PyTorch's, or that of a GPU."""
    text = str(error)
    words = ("out of memory", "allocate", "ALLOC_FAILED", "not enough memory")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def explain(error, config):
    """Some errors from inside PyTorch are something that a user can act on. This raises them again,
    with one line that says how. It does nothing about any other."""
    if is_out_of_memory(error):
        advice = "smaller block_size, n_embd or n_layer"
        if config.batch_size > 1:
            half = config.batch_size // 2
            advice = f"--batch_size {half} --grad_accum {2 * config.grad_accum}, then {advice}"
        raise MemoryError(f"out of memory: try {advice}; for a text that is too large, "
                          "prepare_owt.py") from error
    origin = type(error).__module__  # where this kind of error is defined
    if origin.startswith("torch._"):  # torch._dynamo or torch._inductor, parts of the compiler
        message = " ".join(str(error).split())
        raise ValueError(f"torch.compile failed, try --no-compile: {message[:200]}") from error


# -------------------------------- what a run shows ----------------------------------------------
def sample(model, tokenizer, length):
    """Some text that the model writes now. (It sets torch's seed. That does not disturb training,
    where each batch sets it anew.)"""
    torch.manual_seed(model.config.seed)
    start = torch.tensor([[tokenizer.end]]).to(model.config.device)  # a text begins after an END
    was_training = model.training
    model.eval()
    ids = model.generate(start, length, temperature=0.8)
    model.train(was_training)
    text = tokenizer.decode(ids[0, 1:].tolist())
    return printable(text.replace(END, "\n"))


def printable(text):
    """Some characters would move a terminal's cursor, or do worse. They become UNK."""
    control = r"\x00-\x08\x0b-\x1f\x7f-\x9f"    # but not \x09 and \x0a, tab and line end
    direction = r"\u202a-\u202e\u2066-\u2069"  # would turn the direction of writing
    halves = r"\ud800-\udfff"                   # surrogates, half a character each
    return re.sub(f"[{control}{direction}{halves}]", UNK, text)


def tune(**settings):
    """Measures which settings train fastest, as that depends on the machine (in the course:
    auto-tuning and efficiency testing). It tries both dtypes, with and without the compiler, and
    the batch whole or divided into 2 or 4 parts. ValueError if none can be trained."""
    if WORLD > 1:
        raise ValueError("--tune measures one process: start it without torchrun")
    config, _, _ = choose_settings(settings)  # those of the run that would start or carry on
    splits, tokenizer = load_data(config)
    total = config.batch_size * config.grad_accum
    rates = {}  # {flags: characters a second}
    # product: all combinations, twelve of them
    for parts, dtype, compiled in itertools.product((1, 2, 4), CHOICES["dtype"], (False, True)):
        if total % parts > 0:
            continue
        trial = replace(config, batch_size=total // parts, grad_accum=parts, dtype=dtype,
                        compile=compiled, max_iters=6)
        flags = f"--batch_size {trial.batch_size} --grad_accum {parts} --dtype {dtype}"
        flags += " --compile" if compiled else " --no-compile"
        try:
            rates[flags] = measure(trial, splits["train"], tokenizer.vocab_size)
            result = f"{rates[flags]:,.0f} characters a second"
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = " ".join(str(error).split())
            result = f"failed: {reason[:90]}"
        print(f"{flags}   {result}")
    if not rates:
        raise ValueError("no setting could be trained; the lines above say why")
    print(f"the fastest; add to your command: {max(rates, key=rates.get)}")


def measure(config, data, vocab_size):
    """Characters per second of training, in the fastest of some steps: the first ones are slow. It
    forgets what earlier trials compiled, and empties the memory."""
    torch.compiler.reset()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    model, optimizers, fast_model = build(config, vocab_size)
    batches = list(draw_batches(data, config, step=0))
    seconds = []
    for step in range(config.max_iters):
        start = time.perf_counter()
        loss = training_step(fast_model, optimizers, batches, config, step)
        loss.item()  # waits for the GPU, which is otherwise still at work here
        seconds.append(time.perf_counter() - start)
    characters = config.batch_size * config.grad_accum * config.block_size
    return characters / min(seconds)  # other programs can only slow a step down


# -------------------------------- Muon, another optimizer ---------------------------------------
class Muon(torch.optim.Optimizer):
    """An optimizer for matrices that often needs fewer steps than AdamW (Jordan 2024).
    AdamW treats each number of a matrix by itself, Muon the matrix as a whole. A matrix is a sum of
    patterns, each of them a column times a row, with a strength in front. For example,
        [[1, 0.8], [0.8, 1]] = 0.9 * [[1], [1]] @ [[1, 1]] + 0.1 * [[1], [-1]] @ [[1, -1]]
    In a gradient, some patterns are strong, as many examples agree on them, and others are weak.
    Muon makes all of them about equally strong (see equalize), so that what is rare is learned as
    fast as what is frequent. Before that, it averages the gradients of some twenty steps, which
    removes most of the noise. Its steps are as large as AdamW's: one learning rate serves both."""

    def __init__(self, matrices, config):
        self.config = config
        settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
        super().__init__([{"params": matrices}], settings)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        rate = group["lr"]
        decay = rate * group["weight_decay"]
        # All blocks have matrices of the same shapes. Those of one shape are worked on together,
        # which is faster: {shape: list of matrices}.
        same_shape = defaultdict(list)
        for weight in group["params"]:
            same_shape[weight.shape].append(weight)
        for shape, weights in same_shape.items():
            moves = []
            for weight in weights:
                kept = self.state[weight]  # what this optimizer remembers of it; at first {}
                if not kept:
                    kept["momentum_buffer"] = torch.zeros_like(weight)
                average = kept["momentum_buffer"]
                average.lerp_(weight.grad, 0.05)  # average = 0.95 * average + 0.05 * gradient
                # The gradient, which is in the average already, is mixed in once more (Nesterov).
                moves.append(weight.grad.lerp(average, 0.95))
            with autocast(self.config):  # for speed, and 16 bits are enough
                moves = equalize(torch.stack(moves))
            # In a matrix of 8 x 32 numbers whose 8 patterns have strength 1, the squares of all
            # numbers add up to 8. So they are about sqrt(8 / 256) each, or 1 / sqrt(32). This makes
            # them about 0.2, which is how far AdamW moves a weight on average (Liu et al. 2025).
            size = 0.2 * math.sqrt(max(shape))
            for weight, move in zip(weights, moves):
                weight.mul_(1 - decay)
                weight.sub_(move, alpha=rate * size)  # weight = weight - rate * size * move


def equalize(x):
    """Makes the patterns in matrices, (n, rows, columns), about equally strong (see Muon).
    In x @ x.mT @ x, there are the same patterns as in x, but each strength f has become f ** 3. No
    two patterns mix, because the products between them are 0, such as [[1, 1]] @ [[1], [-1]]. (The
    columns and rows are taken with length 1 here.) So one round of the loop replaces each f by
        3.4445 * f - 4.7750 * f ** 3 + 2.0315 * f ** 5
    In five rounds, 0.1 becomes 0.34, 0.99, 0.71, 1.11 and 0.71, and 0.9 becomes 0.82, 0.95, 0.75,
    1.05 and 0.68: small strengths grow each time, and near 1 the other terms hold them back. All
    that began above 0.01 ends between 0.68 and 1.14. (Jordan found the numbers by experiment. The
    method is called a Newton-Schulz iteration, and the strengths singular values.)"""
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # rows become columns: so the products below are smaller
    # The norm is the root of the sum of the squares of all numbers. Squared strengths have the same
    # sum. So after a division by the norm, no pattern is stronger than 1.
    norm = x.norm(dim=(1, 2), keepdim=True)
    x = x / norm.clamp(min=1e-7)
    one = torch.eye(x.shape[1], device=x.device)  # one @ x is x
    for _ in range(5):
        # With strengths f in x, square has f ** 2, and square @ square has f ** 4.
        square = x @ x.mT
        x = (3.4445 * one - 4.7750 * square + 2.0315 * (square @ square)) @ x
    if is_tall:
        x = x.mT
    return x


# -------------------------------- the command line ----------------------------------------------
def main(argv=None):
    """Reads the words of the command line, and calls train or tune."""
    parser = make_parser()
    settings = vars(parser.parse_args(argv))  # {name: value}, only of flags that were given
    tuning = settings.pop("tune", False)
    try:
        if tuning:
            tune(**settings)
        else:
            train(**settings)
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C
    except (ValueError, OSError, MemoryError) as error:
        parser.error(str(error) or "out of memory")  # Python's own MemoryError says nothing


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake is one line on stderr and exit status 2. (argparse calls this as well.)"""
        line = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {printable(line[:1000])}\n")


def make_parser():
    """Each setting of Config is a flag, and the comment behind it is what --help says."""
    parser = Parser(description="Train a character-level GPT.", allow_abbrev=False,
                    usage="python gpt.py [--data book.txt] [--max_iters 500] ...",
                    argument_default=argparse.SUPPRESS)  # flags that are not given are left out
    comments = {}
    for line in inspect.getsource(Config).splitlines():  # '    seed: int = 1337   # where the ...'
        code, _, comment = line.partition("  # ")        # '    seed: int = 1337 ', 'where the ...'
        name = code.split(":")[0].strip()                # 'seed'
        comments[name] = comment
    on_this_device = Config(**defaults_for(Config.device))
    defaults = asdict(on_this_device)
    for field in fields(Config):
        words = f"{comments[field.name]} (default: {defaults[field.name]})"
        if field.type is bool:  # --compile and --no-compile
            kind = argparse.BooleanOptionalAction
            parser.add_argument(f"--{field.name}", action=kind, help=words)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, metavar="", help=words)
    parser.add_argument("--tune", action="store_true", help="find the fastest settings instead")
    return parser


def catch_signals():
    """From now on, Ctrl-C, the command kill and a terminal that is closed call ask_to_stop."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What is ignored already stays ignored, such as SIGHUP under the command nohup.
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ask_to_stop)


def ask_to_stop(number, frame):
    """Python calls this when a signal comes: do_steps ends its step, saves and stops."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # the default: a second one ends Python at once


def set_up_streams():
    """A terminal without UTF-8 cannot show all characters: it shows "?" instead of failing. Each
    line is written at once, so that a log is up to date. All kinds of line ends are read as "\\n"
    (newline=None)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of a notebook need none of this
            stream.reconfigure(errors="replace", line_buffering=True, newline=None)


if __name__ == "__main__":
    set_up_streams()
    if WORLD == 1 and "--tune" not in sys.argv:  # with torchrun and --tune, Ctrl-C ends it at once
        catch_signals()
    main()
