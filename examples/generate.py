"""Generation on fastattn: the tokens of eager attention, from transformers' own `generate` and its caches.

    python examples/generate.py                        needs: pip install "fastattn[demo]"

A small Llama tells a story with a dynamic, a static and a paged cache (continuous batching, several stories at once),
and Whisper tiny.en writes down what somebody reads aloud. Each is generated with transformers' eager attention and with
fastattn, compared token for token, and timed in turn. Random weights take the place of files that are not there.
"""

import argparse
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages

import torch
from in_turn import time_in_turn

import fastattn

try:
    import transformers
    from pretrained import load_llama, load_speech, load_whisper
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from fastattn.integrations import transformers as fastattn_transformers
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

OURS, THEIRS = "fastattn", "eager"
PROMPTS = ([1], [1, 403, 407], [1, 261, 410, 299, 300], [1, 410, 299, 275, 305, 421, 440, 322])
"""Of different lengths, as ids; 1 begins a text."""

console = Console()


class Case(NamedTuple):
    """One way to generate: a function from nothing to the new tokens of each sequence."""

    model: str
    cache: str
    generate: Callable[[], list[list[int]]]
    owner: torch.nn.Module


class Outcome(NamedTuple):
    case: Case
    tokens: dict[str, list[list[int]]]
    seconds: dict[str, float]
    kernels: Counter

    @property
    def same(self) -> bool:
        return self.tokens[OURS] == self.tokens[THEIRS]


def main(argv: list[str] | None = None) -> list[Outcome]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, and times of one run")
    quick = parser.parse_args(argv).quick
    fastattn_transformers.register()
    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it reports a package that it misses

    llama, whisper, (speech, said) = load_llama(), load_whisper(), load_speech()
    console.print(f"{llama.what}\n{whisper.what}, listening to {said}", highlight=False)
    tokens = 12 if quick else 64
    cases = [*llama_cases(llama.model, tokens), *whisper_cases(whisper.model, speech, min(tokens, 60))]
    outcomes = [run(case, 0.0 if quick else 4.0) for case in tqdm(cases, desc="generating", leave=False, disable=None)]
    print_outcomes(outcomes)
    if whisper.tokenizer is not None:
        text = whisper.tokenizer.decode(outcomes[-1].tokens[OURS][0], skip_special_tokens=True)
        console.print(f"Whisper on fastattn:{text}", highlight=False)
    if not all(outcome.same for outcome in outcomes):
        raise SystemExit("fastattn and eager attention gave different tokens")
    return outcomes


def llama_cases(model, tokens: int) -> list[Case]:
    # No token ends a text, so that all caches are asked for as many.
    options = {
        "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "disable_compile": True,
    }  # fmt: skip
    # Every page that the requests need, and no more tokens a step than that; without limits it takes all memory.
    batching = ContinuousBatchingConfig(
        num_blocks=8 * len(PROMPTS), page_size=32, max_batch_tokens=64, use_cuda_graph=False, use_async_batching=False
    )

    def alone(cache: str | None) -> list[list[int]]:
        config = GenerationConfig(**options, cache_implementation=cache)
        return [model.generate(torch.tensor([ids]), config)[0, len(ids) :].tolist() for ids in PROMPTS]

    def together() -> list[list[int]]:
        found = model.generate_batch([*PROMPTS], GenerationConfig(**options), batching)
        return [found[request].generated_tokens for request in sorted(found)]

    return [
        Case("Llama", "dynamic", partial(alone, None), model),
        Case("Llama", "static", partial(alone, "static"), model),
        Case("Llama", "paged", together, model),
    ]


def whisper_cases(model, features: torch.Tensor, tokens: int) -> list[Case]:
    """An encoder and a decoder; continuous batching serves decoders alone."""

    def alone(cache: str | None) -> list[list[int]]:
        options = {"max_new_tokens": tokens, "do_sample": False, "disable_compile": True, "return_timestamps": False}
        return model.generate(features, cache_implementation=cache, **options).tolist()

    return [Case("Whisper", cache or "dynamic", partial(alone, cache), model) for cache in (None, "static")]


def run(case: Case, budget: float) -> Outcome:
    """The tokens of both, the time of each in turn, and the kernels that ran."""

    def generate(implementation: str) -> list[list[int]]:
        case.owner.set_attn_implementation(implementation)
        return case.generate()

    tokens, seconds = {}, {}
    with kernels() as counted:
        for name in (THEIRS, OURS):
            start = time.perf_counter()
            tokens[name] = generate(name)
            seconds[name] = time.perf_counter() - start
    if budget:
        seconds = time_in_turn({name: partial(generate, name) for name in tokens}, budget, at_least=1)
    return Outcome(case, tokens, seconds, counted)


@contextmanager
def kernels():
    """Counts the kernels that transformers' models run on. `fastattn.record` sees the calls of its own thread, and
    continuous batching runs in another one."""
    counted, attention = Counter(), fastattn_transformers.attention

    def noted(*args, **kwargs):
        out = attention(*args, **kwargs)
        call = fastattn.last_call()
        counted[call.kernel + (f" ({call.isa})" if call.isa else "")] += 1
        return out

    with patch.object(fastattn_transformers, "attention", noted):
        yield counted


def print_outcomes(outcomes: list[Outcome]) -> None:
    table = Table("model", "cache", "tokens", "same tokens", f"{THEIRS} tokens/s", f"{OURS} tokens/s", "ratio")
    for column in table.columns[2:]:
        column.justify = "right"
    for case, tokens, seconds, _ in outcomes:
        count = sum(map(len, tokens[OURS]))
        rates = [count / seconds[name] for name in (THEIRS, OURS)]
        same = "yes" if tokens[OURS] == tokens[THEIRS] else "NO"
        table.add_row(case.model, case.cache, str(count), same, *(f"{rate:.1f}" for rate in rates),
                      f"{rates[1] / rates[0]:.2f}")  # fmt: skip
    console.print(table)
    for case, _, _, counted in outcomes:
        ran = ", ".join(f"{count} calls of {name}" for name, count in counted.most_common())
        console.print(f"{case.model}, {case.cache} cache: {ran}", highlight=False)


if __name__ == "__main__":
    main()
