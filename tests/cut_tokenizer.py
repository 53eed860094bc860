"""Cuts a small tokenizer out of Qwen2.5's: `python tests/cut_tokenizer.py DIRECTORY OUT`.

DIRECTORY is a Qwen2.5 checkpoint (its tokenizer is Apache-2.0). tests/qwen2.5_tokenizer_cut/ was made by it.

Every token keeps its id, so ids have gaps. All special tokens, the chat template and the first MERGES merges
are kept, and those that `texts.TEXTS` and the chat template's own words need. A text that these suffice for
has the ids of the whole tokenizer: the merge of lowest rank comes first, and none that it takes is missing.
"""

import itertools
import json
import sys
from pathlib import Path

from texts import TEXTS
from transformers import PreTrainedTokenizerFast

MERGES = 6000
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Please reason step by step."}],
]


def merges_of(piece: str, rank: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding takes in a piece of text, in the letters that stand for bytes."""
    parts, taken = list(piece), set()
    while True:
        pairs = [pair for pair in itertools.pairwise(parts) if pair in rank]
        if not pairs:
            return taken
        best = min(pairs, key=rank.__getitem__)
        taken.add(best)
        merged, i = [], 0
        while i < len(parts):
            both = tuple(parts[i : i + 2]) == best
            merged.append("".join(best) if both else parts[i])
            i += 2 if both else 1
        parts = merged


def cut(directory: Path, out: Path) -> None:
    """Write the small tokenizer of the one in `directory` to `out`."""
    whole = PreTrainedTokenizerFast.from_pretrained(directory)
    raw = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in raw["model"]["merges"]
    ]
    rank = {merge: i for i, merge in enumerate(merges)}
    needed = set(merges[:MERGES])
    normalizer, split = whole.backend_tokenizer.normalizer, whole.backend_tokenizer.pre_tokenizer
    chats = [whole.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in CHATS]
    for text in [*TEXTS, *chats]:
        for piece, _ in split.pre_tokenize_str(normalizer.normalize_str(text)):
            needed |= merges_of(piece, rank)
    kept = [merge for merge in merges if merge in needed]
    tokens = {"".join(merge) for merge in kept} | {x for merge in kept for x in merge}
    vocabulary = raw["model"]["vocab"]
    ids = {token: i for token, i in vocabulary.items() if token in tokens or len(token) == 1}
    # Special tokens stand in the vocabulary too, which alone lets an id be larger than the count of tokens.
    ids |= {added["content"]: added["id"] for added in raw["added_tokens"]}
    raw["model"] |= {"vocab": ids, "merges": [" ".join(merge) for merge in kept]}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", raw), ("tokenizer_config.json", config)):
        (out / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    cut(*map(Path, sys.argv[1:]))
