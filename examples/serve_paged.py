"""A small server: many requests of different lengths, answered together from one paged cache.

    python examples/serve_paged.py                        needs: pip install "fastattn[demo]"

Requests wait until a place and enough pages are free; then their prompt is read, and from there on they take part in
each step, which adds one token to every running request. One that has ended makes room for the next (continuous
batching). The cache is `fastattn.KVCache`: it appends, turns keys and queries by their positions and attends in one
call, and memory is held in pages, for tokens that exist. Each answer is compared with the one that transformers' own
`generate` gives to the request alone.
"""

import argparse
import os
import time
from collections import Counter, deque
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages

import torch

import fastattn

try:
    from pretrained import load_llama
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers import GenerationConfig
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

PAGE_SIZE, CAPACITY = 16, 320
console = Console()


class Request(NamedTuple):
    prompt: list[int]
    length: int
    """Tokens wanted; the answer is shorter where the model ends it."""


class Served(NamedTuple):
    answers: list[list[int]]
    steps: int
    most_running: int
    most_pages: int
    kernels: Counter


class Llama:
    """transformers' Llama on paged caches, one a layer; `places` are the sequences of the cache."""

    def __init__(self, model, places: int, num_pages: int):
        self.model, config = model.model, model.config
        self.head, self.head_dim = model.lm_head, config.hidden_size // config.num_attention_heads
        self.caches = [
            fastattn.KVCache(places, config.num_key_value_heads, self.head_dim, CAPACITY, dtype=model.dtype,
                             page_size=PAGE_SIZE, num_pages=num_pages)
            for _ in self.model.layers
        ]  # fmt: skip
        angles = torch.arange(CAPACITY)[:, None] * model.model.rotary_emb.inv_freq
        self.rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}

    def next_tokens(self, ids: torch.Tensor, places: list[int]) -> list[int]:
        """The likeliest token behind ids [len(places), new tokens], which go into the caches of their places."""
        x = self.model.embed_tokens(ids)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = cache.attend(q, k, v, places, causal=True, **self.rotary)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.model.norm(x[:, -1])).argmax(-1).tolist()

    def forget(self, place: int) -> None:
        for cache in self.caches:
            cache.reset([place])


def pages_of(request: Request) -> int:
    """Pages of a layer that a request holds when it ends; its last token is never read again."""
    return -(-(len(request.prompt) + request.length - 1) // PAGE_SIZE)


@torch.no_grad()
def serve(model, requests: list[Request], places: int, num_pages: int) -> Served:
    """The answers to all requests; at most `places` run at once, on `num_pages` pages a layer."""
    too_long = [request for request in requests if pages_of(request) > min(num_pages, CAPACITY // PAGE_SIZE)]
    if too_long:
        raise ValueError(f"{too_long[0]} needs {pages_of(too_long[0])} pages; there are {num_pages}, {CAPACITY} tokens")
    llama, end = Llama(model, places, num_pages), model.config.eos_token_id

    def has_ended(i: int) -> bool:
        return len(answers[i]) == requests[i].length or answers[i][-1] == end

    waiting, running, answers = deque(enumerate(requests)), {}, [[] for _ in requests]
    steps = most_running = most_pages = 0
    progress = tqdm(total=len(requests), desc="serving", leave=False, disable=None)
    with fastattn.record() as calls:
        while waiting or running:
            # Admitted with all the pages that it will ever need, so no running request has to give way.
            promised = sum(pages_of(requests[i]) for i in running.values())
            while waiting and len(running) < places and promised + pages_of(waiting[0][1]) <= num_pages:
                i, request = waiting.popleft()
                place = next(place for place in range(places) if place not in running)
                running[place] = i
                promised += pages_of(request)
                answers[i] += llama.next_tokens(torch.tensor([request.prompt]), [place])
            chosen = [place for place, i in running.items() if not has_ended(i)]
            if chosen:
                last = torch.tensor([[answers[running[place]][-1]] for place in chosen])
                for place, token in zip(chosen, llama.next_tokens(last, chosen), strict=True):
                    answers[running[place]].append(token)
                steps += 1
            most_running = max(most_running, len(running))
            most_pages = max(most_pages, num_pages - llama.caches[0].free_pages)
            for place in [place for place, i in running.items() if has_ended(i)]:
                del running[place]
                llama.forget(place)
                progress.update()
    progress.close()
    assert all(cache.free_pages == num_pages for cache in llama.caches)
    return Served(answers, steps, most_running, most_pages, Counter(call.kernel for call in calls))


def make_requests(count: int, vocabulary: int, longest: int) -> list[Request]:
    """Prompts and answers of very different lengths; 1 begins a text."""
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    return [
        Request([1, *torch.randint(3, vocabulary, (draw(0, longest // 2),), generator=random).tolist()],
                draw(1, longest // 2))
        for _ in range(count)
    ]  # fmt: skip


def alone(model, request: Request) -> list[int]:
    """What transformers' generate answers, with its own attention and cache."""
    options = GenerationConfig(max_new_tokens=request.length, do_sample=False, pad_token_id=0, disable_compile=True)
    return model.generate(torch.tensor([request.prompt]), options)[0, len(request.prompt) :].tolist()


def main(argv: list[str] | None = None) -> Served:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few short requests")
    parser.add_argument("--requests", type=int, default=None, help="default: 64, with --quick 6")
    arguments = parser.parse_args(argv)
    count = arguments.requests or (6 if arguments.quick else 64)
    places, num_pages, longest = (3, 12, 48) if arguments.quick else (16, 160, 256)

    model, what, _ = load_llama()
    model.double()  # in float32 rounding decides between two tokens now and then, and batches round differently
    requests = make_requests(count, model.config.vocab_size, longest)
    console.print(
        f"{what}, in float64. {count} requests, {places} places, {num_pages} pages of {PAGE_SIZE} tokens a layer",
        highlight=False,
    )
    seconds = {}
    for name in (one_at_a_time := "one after the other", together := "together"):
        start = time.perf_counter()
        served = serve(model, requests, places if name == together else 1, num_pages)
        seconds[name] = time.perf_counter() - start
    progress = tqdm(requests, desc="each alone, by transformers", leave=False, disable=None)
    expected = [alone(model, request) for request in progress]

    tokens = sum(map(len, served.answers))
    table = Table("", "seconds", "tokens/s")
    for name in (one_at_a_time, together):
        table.add_row(name, f"{seconds[name]:.2f}", f"{tokens / seconds[name]:.0f}")
    console.print(table)
    console.print(
        f"{tokens} tokens in {served.steps} steps, up to {served.most_running} requests at once, in at most "
        f"{served.most_pages} pages a layer; room for the longest in every place would take "
        f"{places * max(map(pages_of, requests))}.",
        highlight=False,
    )
    console.print("Kernels: " + ", ".join(f"{n} calls of {name}" for name, n in served.kernels.most_common()))
    same = sum(answer == other for answer, other in zip(served.answers, expected, strict=True))
    console.print(f"Answers that are those of the request alone: {same} of {count}", highlight=False)
    if same < count:
        raise SystemExit("served answers differ from those of requests alone")
    return served


if __name__ == "__main__":
    main()
