"""Talk to a model that gpt.py trained.

    python chat.py                          a base model continues what you type, a fine-tuned one answers
    python chat.py --prompt "The "          once, then exit
    echo "The " | python chat.py            in a pipe
    python chat.py --int8                   a quarter of the memory
"""
import sys, time
from contextlib import suppress

import torch
import torch.nn as nn

import gpt


class Int8Linear(nn.Module):
    """nn.Linear with 8 bits a weight: rows of whole numbers from -127 to 127, and one scale a row to multiply them by.

    Fewer bits mean less memory, and generation mostly waits for weights to arrive from it. Activations become bfloat16.
    (Training on top of quantized weights, by small matrices beside them, is QLoRA: Dettmers et al. 2023.)
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)  # (out,)
        self.bias = linear.bias

    def forward(self, x):
        if x.device.type == "cpu" and x.shape[-1] % 16 == 0 and hasattr(torch, "_weight_int8pack_mm"):
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(model):
    """Turns every nn.Linear into an Int8Linear and the rest into bfloat16, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear(module))
    return model.bfloat16()


class Chat:
    """A conversation: its context so far, and how to add to it. options are those of GPT.stream."""

    def __init__(self, model, tokenizer, config, **options):
        self.model, self.tokenizer, self.answers, self.options = model, tokenizer, config.answers_prompts, options
        self.device, self.context = config.device, []

    def answer(self, prompt):
        """Yields the characters that follow prompt, fit for a terminal. The context grows by both.

        A model trained on pairs sees what it saw in training: END, prompt, line end; and answers until END. Any other
        continues the text as typed.
        """
        ids = self.tokenizer.encode(prompt + "\n" * self.answers).tolist()
        if unknown := ids.count(self.tokenizer.unk):
            print(f"(characters that the model has never seen: {unknown})", file=sys.stderr)
        self.context += [self.tokenizer.end] * self.answers + ids
        self.context = self.context or [self.tokenizer.end]  # nothing yet: a text begins where another ended
        for token in self.model.stream(torch.tensor([self.context], device=self.device), **self.options):
            if self.answers and token.item() == self.tokenizer.end:
                return
            self.context.append(token.item())
            yield gpt.printable(self.tokenizer.decode([token.item()]).replace(gpt.END, "\n"))

    def show(self, prompt, stats=False):
        """Prints the answer as it comes; Ctrl-C ends it."""
        start, count = time.perf_counter(), 0
        with suppress(KeyboardInterrupt):
            for count, text in enumerate(self.answer(prompt), 1):
                print(text, end="", flush=True)
        print(flush=True)
        if stats:
            print(f"({count} characters, {count / (time.perf_counter() - start):,.0f} a second)", file=sys.stderr)


def talk(chat, stats):
    """Reads lines until there are no more. A terminal has a prompt, line editing and history; a pipe the text alone."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with suppress(ImportError):
        import readline  # noqa: F401  input() uses it; not on Windows
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print(end="\n" * terminal)
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return
        if line == "/clear":
            chat.context = []
        elif line == "/help":
            print("/clear forgets, /quit or Ctrl-D leaves, Ctrl-C stops, an empty line goes on", file=sys.stderr)
        elif line or not chat.answers:
            print(end="" if terminal or chat.answers else gpt.printable(line))  # in a pipe, the text that goes on
            chat.show(line, stats)


def main(argv=None):
    """The command line."""
    parser = gpt.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="model.pkl", help="checkpoint (model.pkl)")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="longest answer (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest, 1 as learned (0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest; 0 is all (0)")
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument("--device", default=gpt.Config.device, help=f"cpu, cuda or mps ({gpt.Config.device})")
    parser.add_argument("--stats", action="store_true", help="characters per second after each answer")
    parser.add_argument("--int8", action="store_true", help="8 bits a weight")
    flags = parser.parse_args(argv)
    torch.manual_seed(flags.seed % 2**63) if flags.seed is not None else torch.seed()
    try:
        for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not low <= getattr(flags, name) < 2**31:
                raise ValueError(f"--{name} must be from {low} to {2**31 - 1}, not {getattr(flags, name)}")
        model, tokenizer, config = gpt.load_model(flags.model, flags.device)
        if flags.int8:
            before = sum(t.nbytes for t in model.state_dict().values()) / 2**20
            after = sum(t.nbytes for t in quantize(model).state_dict().values()) / 2**20
            print(f"weights: {before:.1f} MiB, as int8 {after:.1f} MiB", file=sys.stderr)
        chat = Chat(model, tokenizer, config, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature,
                    top_k=flags.top_k or None)
        if flags.prompt is not None:
            print(end=gpt.printable(flags.prompt) + "\n" * chat.answers)
            chat.show(flags.prompt, flags.stats)
        else:
            print(f"{flags.model} {'answers' if chat.answers else 'continues your text'}; /help", file=sys.stderr)
            talk(chat, flags.stats)
    except FileNotFoundError:
        parser.error(f"{flags.model}: no such model; python gpt.py makes one")
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdin, sys.stdout)):  # without the closed ones
        stream.reconfigure(errors="replace")
    main()
