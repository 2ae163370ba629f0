"""Talk to a model that gpt.py trained.

    python chat.py                     a base model continues your text, a fine-tuned one answers
    python chat.py --prompt "The "     once, then exit
    echo "The " | python chat.py       in a pipe
    python chat.py --int8              weights in a quarter of the memory
"""
import os, sys, time
from contextlib import suppress
import torch
import gpt


class Chat:
    """A conversation. A model remembers nothing: each time, it reads again what has been said, the
    context, and sees the last block_size characters of it. options: those of GPT.stream."""

    def __init__(self, model, tokenizer, config, **options):
        self.model, self.tokenizer = model, tokenizer
        self.config, self.options = config, options
        self.answers = config.data.endswith(".jsonl")  # it was trained on prompts and answers
        self.context = []  # token ids

    def answer(self, prompt):
        """Yields the characters that follow prompt, fit for a terminal. The context grows by both.
        A model trained on pairs reads what it read in training (END, prompt, line end) and answers
        until END. Any other model continues the text as typed."""
        if self.answers:
            self.context.append(self.tokenizer.end)
            prompt += "\n"
        ids = self.tokenizer.encode(prompt).tolist()
        unknown = ids.count(self.tokenizer.unk)
        if unknown:
            print(f"(characters that the model has never seen: {unknown})", file=sys.stderr)
        if len(ids) > self.config.block_size:
            print(f"(prompt cut to its last {self.config.block_size} characters)", file=sys.stderr)
        self.context = (self.context + ids) or [self.tokenizer.end]  # a text begins after an END
        index = torch.tensor([self.context], device=self.config.device)
        for token in self.model.stream(index, **self.options):
            token = token.item()
            if self.answers and token == self.tokenizer.end:
                return
            self.context.append(token)
            yield gpt.printable(self.tokenizer.decode([token]).replace(gpt.END, "\n"))

    def show(self, prompt, stats=False):
        """Prints the answer as it comes; Ctrl-C ends it."""
        start = time.perf_counter()
        count = 0
        with suppress(KeyboardInterrupt):
            for count, text in enumerate(self.answer(prompt), start=1):
                print(text, end="", flush=True)
        print(flush=True)
        if stats:
            rate = count / (time.perf_counter() - start)
            print(f"({count} characters, {rate:,.0f} a second)", file=sys.stderr)


def talk(chat, stats):
    """Answers lines until there are no more. Into a pipe goes the text and nothing else."""
    with suppress(ImportError):
        import readline  # noqa: F401  makes input() edit lines; Windows has none
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            if terminal:
                print()
            return
        if line == "/quit":
            return
        if line == "/clear":
            chat.context = []
        elif line == "/help":
            print("/clear forgets, /quit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
        elif line or not chat.answers:  # with an empty line, a base model goes on
            if not terminal and not chat.answers:
                print(gpt.printable(line), end="")  # from a pipe: it is not on screen
            chat.show(line, stats)


class Int8Linear(torch.nn.Module):
    """An nn.Linear with 8 bits a weight, whole numbers from -127 to 127, and a scale for each row:
    generation mostly waits for weights to come from memory. 8 bits lose nothing that can be
    measured here; 4, as in QLoRA (Dettmers et al. 2023), halve the memory again, at some cost."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()                          # (out, in)
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,): the largest becomes 127
        # A buffer is saved and moved with the module, but not learned.
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        # PyTorch's own product with 8-bit weights, where it has one, takes widths of 16, 32, 48 ...
        product = getattr(torch, "_weight_int8pack_mm", None)
        if product and x.device.type == "cpu" and x.shape[-1] % 16 == 0:
            y = product(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(model):
    """Makes each nn.Linear an Int8Linear, in place; the rest, as embeddings, becomes bfloat16."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Int8Linear(module))
    return model.bfloat16()


def main(argv=None):
    """The command line."""
    parser = gpt.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="model.pkl", help="checkpoint (model.pkl)")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="longest answer (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is the likeliest (0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="choose among k; 0 is all (0)")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="same seed, same text")
    parser.add_argument("--device", default=gpt.Config.device, help="cpu, cuda or mps")
    parser.add_argument("--stats", action="store_true", help="show characters a second")
    parser.add_argument("--int8", action="store_true", help="8 bits a weight")
    flags = parser.parse_args(argv)
    for name, lowest in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not lowest <= getattr(flags, name) < 2**31:
            parser.error(f"--{name} must be from {lowest} to {2**31 - 1}")
    torch.manual_seed(flags.seed % 2**63)
    if not os.path.exists(flags.model):
        parser.error(f"{flags.model}: no such model; python gpt.py makes one")
    try:
        model, tokenizer, config = gpt.load_model(flags.model, flags.device)
        if flags.int8:
            before = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
            quantize(model)
            after = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
            print(f"weights: {before:.1f} MiB, as int8 {after:.1f} MiB", file=sys.stderr)
        chat = Chat(model, tokenizer, config, max_new_tokens=flags.max_new_tokens,
                    temperature=flags.temperature, top_k=flags.top_k or None)
        if flags.prompt is None:
            does = "answers" if chat.answers else "continues your text"
            print(f"{flags.model} {does}; /help", file=sys.stderr)
            talk(chat, flags.stats)
        else:
            print(gpt.printable(flags.prompt), end="\n" if chat.answers else "")
            chat.show(flags.prompt, flags.stats)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdin, sys.stdout)):  # one that is closed is None
        stream.reconfigure(errors="replace")
    main()
