"""Ask a model: `python -m fr3e_jax.generate --model DIR_OR_NAME --prompt TEXT`.

The answer streams to stdout as it is decoded, by the engine that training samples with; everything else
goes to stderr.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tokenizers.decoders import DecodeStream

from fr3e_jax.cli import ending_in_one_line, parse
from fr3e_jax.config import ConfigError, check_options
from fr3e_jax.config.values import Name, NonNegativeInt, NonNegativeNumber, Samples, Seed, Size, TopK, TopP
from fr3e_jax.engine.finite import NotFiniteError, require_finite
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.decoder import Params, abstract_params, logical_axes
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.mesh import PlacementError, make_mesh, row_parts, widest_tensor
from fr3e_jax.parallel.sizes import next_multiple
from fr3e_jax.pretrained.model import compute_type, open_model
from fr3e_jax.pretrained.stops import before_stop
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.problems.stream import padded_width
from fr3e_jax.run.build import Policy, policy_of
from fr3e_jax.run.compilation import keep_compiled
from fr3e_jax.run.run_dir import holds_run
from fr3e_jax.run.storage import location
from fr3e_jax.run.trained import setting
from fr3e_jax.types import Queries, Rollouts

LOOK_EVERY = 4  # tokens between two looks at what was generated


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Ask a model and read its answer as it is written."""

    model: Name
    """Hugging Face directory of a Qwen2, Qwen3 or Llama model, run directory of train (the model that the run
    ended with), name on the hub (`Org/Name`, or `Org/Name@revision`), or `quickstart` for the small one that
    is shipped."""
    prompt: str
    """What the user says; with --raw, the text to go on from."""
    template: Name | None = None
    """What the model sees of it, as data.template of train. By default that of a run, and `chat` for other
    models."""
    raw: bool = False
    """Take the prompt as it is, through no template: control tokens in it, such as <|im_end|>, are control
    tokens. Without --raw they are text."""
    temperature: NonNegativeNumber = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: TopK = 0
    """Draw from this many of the most likely tokens; 0 from all."""
    top_p: TopP = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all."""
    stop: list[str] | None = None
    """Texts that end an answer, as the model's end tokens do; the answer is cut before such a text. By
    default those that a run was trained with."""
    max_new_tokens: Size = 256
    """Longest answer, tokens; the model's context may end it before."""
    n: Samples = 1
    """Answers to sample; the prompt is run once for all of them. The first is shown as it is written."""
    seed: Seed = 0
    """All randomness is a function of it."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and matrix products; `auto` is bfloat16 on accelerators and float32 on CPU."""
    tensor: NonNegativeInt = 0
    """Parts that heads, MLP and vocabulary are split into over the devices; 0 takes as many as the model's
    shape allows."""
    compilation_cache: Name = "auto"
    """Where compiled programs are kept, as in train."""


def check_generation(config: GenerateConfig, prompt_tokens: int, context: int) -> None:
    """Refuse what cannot run.

    Raises:
      ConfigError: with one line that says what to change.
    """
    check_options(config)
    if config.n > 1 and config.temperature == 0:
        raise ConfigError(
            f"n is {config.n}, but at temperature 0 all answers are the same; set --temperature"
        )
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty; give the model a token to go on from")
    if prompt_tokens >= context:
        raise ConfigError(f"the prompt has {prompt_tokens} tokens; the model's context is {context}")


def generate(config: GenerateConfig) -> list[str]:
    """Load the model, answer, and show the answers.

    Returns:
      The answers, special tokens left out.
    """
    described = open_model(config.model)
    text = text_of(config, described.source)
    if endless := text.endless():
        say(f"{endless} (--stop)")
    query = text.encoded(config.prompt) if config.raw else text.query(config.prompt)
    check_generation(config, len(query), described.config.context)
    shapes = abstract_params(described.config)
    devices = jax.device_count()
    widest = widest_tensor(logical_axes(described.config), shapes, devices)
    tensor = config.tensor or widest
    try:
        placed = described.place(make_mesh(-1, 1, tensor))
    except PlacementError:
        raise ConfigError(
            f"tensor {tensor} does not divide this model and the {devices} device(s); the largest that does "
            f"is {widest}"
        ) from None
    dtype = compute_type(config.compute_dtype)
    say(
        f"{config.model}: {parameter_count(shapes):,} parameters, {dtype} | {devices} "
        f"{jax.default_backend()} device(s), {tensor} to a copy"
    )
    policy = policy_of(placed, text, dtype)
    return show_answers(config, text, answer(config, policy, policy.read(), query))


def text_of(config: GenerateConfig, source: Path) -> Text:
    """The tokenizer, the template and the stop texts: those given, else those that a run was trained with.

    Args:
      config: settings of the command.
      source: directory of the model's tokenizer.
    """
    template, stop, run = config.template, config.stop, location(config.model)
    if holds_run(run):
        template = template or setting(run, "data", "template")
        stop = setting(run, "rollout", "stop", []) if stop is None else stop
    return load_text(source, "plain" if config.raw else template or "chat", stop or ())


def answer(config: GenerateConfig, policy: Policy, params: Params, query: list[int]) -> Iterator[Rollouts]:
    """What the `n` branches have generated, again and again as they go on: Rollouts [copies, branches].

    The copies of the model take the branches in turns, and some more where `n` does not divide. A branch's
    number, and with it what it draws, does not depend on how many copies there are.
    """
    place = policy.model.sampling
    copies = row_parts(place.mesh)
    width = padded_width(len(query))
    token = np.zeros((copies, width), np.int32)
    token[:, : len(query)] = query
    length = np.full(copies, len(query), np.int32)
    number = np.arange(next_multiple(config.n, copies), dtype=np.int32).reshape(-1, copies).T
    asked = number < config.n
    queries, number = place.place_rows((Queries(token, length, np.zeros_like(length)), number))
    most = min(config.max_new_tokens, policy.model.config.context - len(query))
    engine = policy.engine(most)
    branches, opened = engine.open_queries(params, queries, number, jax.random.key(config.seed), 0)
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    for decoding in engine.decode(params, branches, opened, sampling, every=LOOK_EVERY):
        yield jax.device_get(decoding.rollouts)
        if not (jax.device_get(decoding.running) & asked).any():
            return


def show_answers(config: GenerateConfig, text: Text, answers: Iterator[Rollouts]) -> list[str]:
    """Print the first answer as it grows, then the others, and what it took."""
    started = time.perf_counter()
    first_token = None
    pieces, said, printed = Pieces(text), "", ""
    for rollouts in answers:
        require_finite(rollouts, f"after {rollouts.length.max()} tokens")
        first_token = first_token or time.perf_counter()
        said += pieces.take(rollouts.token[0, 0, : rollouts.length[0, 0]].tolist())
        piece = before_stop(said, text.stop)[len(printed) :]
        print(piece, end="", flush=True)
        printed += piece
    finished = time.perf_counter()

    copies = rollouts.length.shape[0]
    branches = [(i % copies, i // copies) for i in range(config.n)]
    rows = [rollouts.token[n, c, : rollouts.length[n, c]] for n, c in branches]
    shown = text.answers(rows, [rollouts.stopped[branch] for branch in branches])
    # The stream holds back bytes that are not yet a character; what it showed can only differ where bytes
    # were no text at all.
    print(shown[0].removeprefix(printed) if shown[0].startswith(printed) else f"\n{shown[0]}")
    for i, other in enumerate(shown[1:], start=2):
        say(f"--- {i} of {config.n}")
        print(other)
    rollouts = text.trimmed(rollouts)
    lengths = [int(rollouts.length[branch]) for branch in branches]
    cut = sum(not rollouts.stopped[branch] for branch in branches)
    assert first_token is not None
    say(summary(lengths, cut, first_token - started, finished - first_token))
    return shown


class Pieces:
    """Text of a growing answer, as far as its characters are complete."""

    def __init__(self, text: Text) -> None:
        self.tokenizer = text.tokenizer.backend_tokenizer
        self.stream: Any = DecodeStream(skip_special_tokens=True)
        self.seen = 0

    def take(self, tokens: list[int]) -> str:
        """The text that `tokens`, all of the answer so far, have more than those of the call before."""
        piece = ""
        try:
            while self.stream is not None and self.seen < len(tokens):
                piece += self.stream.step(self.tokenizer, tokens[self.seen]) or ""
                self.seen += 1
        except Exception:  # bytes that later tokens turned into others; the rest is shown at the end
            self.stream = None
        return piece


def summary(lengths: Sequence[int], cut: int, wait: float, seconds: float) -> str:
    """One line on what was generated.

    Args:
      lengths: tokens of each answer.
      cut: answers that did not come to an end.
      wait: seconds to the first token, compilation included. seconds: from there to the last.
    """
    rate = (sum(lengths) - len(lengths)) / seconds if max(lengths) > 1 else 0.0
    ended = f", {cut} answer(s) cut before the end" if cut else ""
    return f"{sum(lengths)} tokens{ended} | first after {wait:.1f} s, then {rate:.1f} tokens/s"


def parameter_count(shapes: Params) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(shapes))


def say(message: str) -> None:
    """A line for people, beside the answer."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(GenerateConfig, "generate", None)
    with ending_in_one_line("generate", (ConfigError, CheckpointError), (NotFiniteError,)):
        keep_compiled(config.compilation_cache, None)
        try:
            generate(config)
        except BrokenPipeError:  # the reader had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
