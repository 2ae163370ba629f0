"""Talk to a model that gpt.py trained.

    python chat.py                     a model of texts continues yours, one of pairs answers
    python chat.py --prompt "The "     does so once, then exits
    echo "The " | python chat.py       reads from a pipe
    python chat.py --int8              keeps its weights in a quarter of the memory
"""
import os, sys, time
import torch
import gpt

HELP = ("/why shows what else might have come, /clear forgets, /quit or Ctrl-D leaves, Ctrl-C "
        "stops an answer; after an empty line, a model of texts goes on")


# -------------------------------- the command line ----------------------------------------------
def main(argv=None):
    """Reads the flags, loads the model, and talks."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    try:
        chat = load(flags)
        if flags.prompt is None:
            does = "answers" if chat.answers else "continues your text"
            print(f"{flags.model} {does}; /help", file=sys.stderr)
            talk(chat, flags.stats)
        else:
            end = "\n" if chat.answers else ""
            print(gpt.printable(flags.prompt), end=end)
            chat.show(flags.prompt, flags.stats)
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C
    except (ValueError, OSError) as error:
        parser.error(error)
    except (RuntimeError, MemoryError) as error:
        if gpt.is_out_of_memory(error):
            parser.error("out of memory: the model is too large here, so try --int8 or --device")
        raise


def make_parser():
    parser = gpt.Parser(description="Talk to a model that gpt.py trained.", allow_abbrev=False)
    parser.add_argument("--model", default="model.pkl", help="checkpoint (model.pkl)")
    parser.add_argument("--prompt", help="continue or answer this, then exit")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="longest answer (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="choose among k; 0 is all (0)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31,
                        help="same seed, same text")
    parser.add_argument("--device", default=gpt.Config.device, help="cpu, cuda or mps")
    parser.add_argument("--stats", action="store_true", help="show characters a second")
    parser.add_argument("--int8", action="store_true", help="8 bits a weight")
    return parser


def load(flags):
    """The chat that the flags ask for. ValueError or OSError for a user's mistake."""
    for name, lowest in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not lowest <= getattr(flags, name) <= 2**31:
            raise ValueError(f"--{name} must be from {lowest} to {2**31}")
    torch.manual_seed(flags.seed)
    if not os.path.exists(flags.model):
        raise ValueError(f"{flags.model}: no such model; python gpt.py makes one")
    model, tokenizer = gpt.load_model(flags.model, flags.device)
    if flags.int8:
        before = size_of(model)
        quantize(model)
        print(f"weights: {before:.1f} MiB, as int8 {size_of(model):.1f} MiB", file=sys.stderr)
    return Chat(model, tokenizer, max_new_tokens=flags.max_new_tokens,
                temperature=flags.temperature, top_k=flags.top_k)


def talk(chat, stats):
    """Answers lines until there are no more. Into a pipe, it prints the text and nothing else."""
    try:
        import readline  # noqa: F401  makes input() edit lines
    except ImportError:
        pass  # Windows has none
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    prompt = ""
    if terminal:
        prompt = "> "
    for line in typed_lines(prompt):
        command = line.strip()
        if command == "/quit":
            return
        if command == "/clear":
            chat.turns = []
        elif command == "/why":
            print("\n".join(chat.why()))
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif line or not chat.answers:  # with an empty line, a base model goes on
            if not terminal and not chat.answers:
                print(gpt.printable(line), end="")  # from a pipe: nobody has seen it yet
            chat.show(line, stats)


def typed_lines(prompt):
    """Yields what is typed, or comes from a pipe, line by line."""
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            break
    if prompt:
        print()


# -------------------------------- a conversation ------------------------------------------------
class Chat:
    """A conversation. A model remembers nothing: each time, it reads again what has been said. It
    sees at most block_size characters, and from time to time only the last half of them (see
    GPT.stream). options: temperature and the like, for GPT.stream."""

    def __init__(self, model, tokenizer, **options):
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.options = options
        self.answers = gpt.kind_of(self.config.data) == "pairs"  # trained on prompts and answers
        self.turns = []  # token ids: a list for each prompt with its answer

    def read(self, prompt):
        """Adds a prompt to the conversation; says on stderr what the model cannot see of it.
        A model trained on pairs gets what it got in training: END, prompt, line end. Any other
        model gets the text as typed."""
        prompt = gpt.clean(prompt)
        if self.answers:
            prompt += "\n"
        ids = self.tokenizer.encode(prompt).tolist()
        unknown = ids.count(self.tokenizer.unk)
        if unknown > 0:
            print(f"(characters that the model has never seen: {unknown})", file=sys.stderr)
        if len(ids) > self.config.block_size:
            seen = f"the last {self.config.block_size} characters at most"
            print(f"(too long: the model sees {seen})", file=sys.stderr)
        nothing_yet = len(self.context()) == 0 and len(ids) == 0
        if self.answers or nothing_yet:
            ids.insert(0, self.tokenizer.end)  # a text begins after an END
        self.turns.append(ids)
        # Half of what the model sees is left for the answer, so old turns are dropped until the
        # rest fits into the other half. They are dropped whole: half a question would mislead.
        half = self.config.block_size // 2
        while self.answers and len(self.turns) > 1 and len(self.context()) > half:
            del self.turns[0]

    def context(self):
        """The conversation as the model reads it: all token ids."""
        ids = []
        for turn in self.turns:
            ids += turn
        return ids

    def answer(self, prompt):
        """Yields the characters that follow prompt, made safe for a terminal. A model of pairs ends
        its answer with END."""
        self.read(prompt)
        index = torch.tensor([self.context()]).to(self.config.device)
        for drawn in self.model.stream(index, **self.options):
            id = drawn.item()
            if self.answers and id == self.tokenizer.end:
                return
            self.turns[-1].append(id)
            char = self.tokenizer.decode([id])
            yield gpt.printable(char.replace(gpt.END, "\n"))

    def show(self, prompt, stats=False):
        """Prints the answer as it comes; Ctrl-C ends it."""
        start = time.perf_counter()
        count = 0
        try:
            for char in self.answer(prompt):
                print(char, end="", flush=True)
                count += 1
        except KeyboardInterrupt:
            pass
        print()
        if stats:
            rate = count / (time.perf_counter() - start)
            print(f"({count} characters, {rate:,.0f} a second)", file=sys.stderr)

    @torch.no_grad()
    def why(self, length=12):
        """A line for each of the last characters of the conversation, typed or written: how likely
        the model found it, before temperature and top_k, and what else might have come. The loss of
        a text is the mean of -ln(share) over these shares."""
        ids = self.context()[-self.config.block_size:]
        if len(ids) < 2:
            return ["nothing to explain yet"]
        index = torch.tensor([ids[:-1]]).to(self.config.device)
        logits, _ = self.model(index)
        shares = logits[0].float().softmax(dim=-1)  # (T, V): row t is about character t + 1
        lines = []
        for place in range(max(1, len(ids) - length), len(ids)):
            row = shares[place - 1]
            came = ids[place]
            others = row.argsort(descending=True).tolist()
            others.remove(came)
            line = f"{self.name(came)} {self.bar(row[came])} {row[came]:6.1%}   else"
            for id in others[:4]:
                line += f"  {self.name(id)} {row[id]:6.1%}"
            lines.append(line)
        return lines

    def name(self, id):
        """A character in a form that one can see, six wide: a space is ' '."""
        char = self.tokenizer.chars[id]
        name = repr(char)  # which writes a line end as '\n'
        if char == gpt.END:
            name = "END"
        if char == gpt.UNK:
            name = "UNK"
        return f"{name:6}"

    def bar(self, share):
        """A share as a bar, ten wide."""
        full = round(10 * share.item())
        return "█" * full + "·" * (10 - full)


# -------------------------------- 8 bits a weight -----------------------------------------------
class Int8Linear(torch.nn.Module):
    """An nn.Linear with 8 bits a weight, whole numbers from -127 to 127, and a scale for each row:
    a quarter of the memory. On a CPU, generation mostly waits for weights to come from memory.
    With 8 bits, answers stay the same (a test asks for them); 4 bits, as in QLoRA (Dettmers et al.
    2023), would halve the memory again, at some loss."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()                          # (out, in)
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,): the largest becomes 127
        whole = (weight / scale[:, None]).round()
        # A buffer is saved and moved with the module, but not learned.
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        # PyTorch's own product with 8-bit weights, where it has one, takes widths of 16, 32, 48 ...
        product = getattr(torch, "_weight_int8pack_mm", None)
        if product and x.shape[-1] % 16 == 0:
            rows = x.flatten(0, -2)
            y = product(rows, self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y


def quantize(model):
    """Makes each nn.Linear an Int8Linear, in place; all else (embeddings) becomes bfloat16."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Int8Linear(module))
    return model.bfloat16()


def size_of(model):
    """The memory of a model's weights, in MiB."""
    tensors = model.state_dict().values()
    return sum(tensor.nbytes for tensor in tensors) / 2**20


if __name__ == "__main__":
    gpt.set_up_streams()
    main()
