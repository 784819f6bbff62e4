"""The page of token links at its largest: how large it is, how soon Chromium shows it, how long it takes to make.

    PYTHONPATH=tests/support python bench/looking.py [--rounds 5]        needs Chromium

Exit status 1: the page is above its target.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fastattn import viz

TOKENS, LAYERS, HEADS = 512, 12, 12
MOST_MIB, MOST_SECONDS = 8.0, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that the page is opened; the median counts")
    options = parser.parse_args()
    from browser import CHROMIUM, Browser

    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Of heads that see near and far, as trained ones do.
    distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    reach = 2.0 ** torch.arange(HEADS)[:, None, None]
    weights = [(2.0 * torch.randn(HEADS, TOKENS, TOKENS) - distance / reach).softmax(-1) for _ in range(LAYERS)]
    start = time.thread_time()
    page = viz.links(weights, [f"token{i}" for i in range(TOKENS)])
    made = time.thread_time() - start

    ready = []
    with TemporaryDirectory() as folder, Browser() as browser:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        for _ in range(options.rounds):
            browser.open(path)
            ready.append(float(browser.run("document.documentElement.dataset.ready")) / 1e3)
    mib, seconds = len(page.encode()) / 2**20, torch.tensor(ready).median().item()
    print(f"a page of {TOKENS} tokens, {LAYERS} layers, {HEADS} heads, made in {made:.1f} s of one thread")
    missed = mib > MOST_MIB or seconds > MOST_SECONDS
    print(
        f"  {mib:.2f} MiB (at most {MOST_MIB:g}), ready in {seconds:.2f} s (at most {MOST_SECONDS:g})"
        + ": missed" * missed
    )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
