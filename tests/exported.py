"""What transformers reads of exported directories, as JSON on stdout: run with version 4 and with version 5.

    python exported.py DIRECTORIES.json

DIRECTORIES.json: directory -> {"token": ids, "texts": to encode, "messages": of a chat or None}.
Imports nothing of the project, since it runs where version 4 is installed.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def ids_of(found):
    """An id, several, or none, as a list."""
    return found if isinstance(found, list) else [] if found is None else [found]


def read(directory, token, texts, messages):
    """Logits, what ends an answer in a call of generate without settings, and the tokens of texts."""
    model = AutoModelForCausalLM.from_pretrained(directory).to(torch.float32).eval()
    tokenizers = [kind.from_pretrained(directory) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
    settings = model.generation_config
    with torch.no_grad():
        logits = model(torch.tensor([token])).logits[0]
        # What a user does: everything that the tokenizer gives goes to generate.
        inputs = tokenizers[0](texts[0], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    template = None if messages is None else [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for tokenizer in tokenizers
    ]  # fmt: skip
    return {
        "logits": logits.tolist(),
        "ends": ids_of(settings.eos_token_id),
        "config ends": ids_of(model.config.eos_token_id),
        "pad": settings.pad_token_id,
        "changed": sorted(settings.to_diff_dict()),
        "generated": generated.tolist(),
        "template": template,
        "encoded": [tokenizer(texts)["input_ids"] for tokenizer in tokenizers],
        "words": [len(tokenizer) for tokenizer in tokenizers],
    }


wanted = json.loads(Path(sys.argv[1]).read_text())
told = {directory: read(directory, **asked) for directory, asked in wanted.items()}
print(json.dumps({"version": transformers.__version__, "read": told}))
