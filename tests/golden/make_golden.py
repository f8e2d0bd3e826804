"""Makes the golden files with llama.cpp, an implementation that shares no line with ours. `make golden`.

tokens.json  token ids of 200 strings, with control tokens parsed and not.
logits.json  for some prompts: the 20 likeliest next tokens with their log-probabilities, and the greedy
             continuation with, at each step, how far the runner-up was behind.

Prompts are evaluated in one batch and without a prompt cache, on one thread, with f32 KV and without flash
attention, so that what is left of a difference is arithmetic: llama.cpp quantises activations to Q8_1 in
front of Q4_1 weights and to Q8_0 in front of Q8_0, as we do.
"""

import ctypes
import json
import math
import os
import sys
from pathlib import Path

import llama_cpp

from strings import STRINGS

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("COLLOQUY_CACHE", Path.home() / ".cache/colloquy"))
MODEL = Path(os.environ.get("COLLOQUY_MODEL", CACHE / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
TOP = 20
CONTINUATION = 24

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


def chat(text):
    return f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


STORY = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the boat came round the point. "
    "She put down the lamp, wiped her hands, and walked to the edge of the rocks to see who it was. "
)

PROMPTS = {  # About 1, 5, 37, 120, 400 and 1,500 tokens: within a block, at its border, over many.
    "one token": "Once",
    "a few words": "The capital of France is",
    "a question": chat("What is the capital of France?"),
    "a task": chat(
        "Here is a list of numbers: 17, 4, 99, 23, 8. Sort them, name the largest, and say in one sentence why "
        "sorting algorithms compare elements pairwise. Then write a haiku about it."
    ),
    "a page": chat("Summarise this story.\n\n" + STORY * 8),
    "a long history": chat("Continue this story.\n\n" + STORY * 32),
}


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def ranked(row):
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


class Model:
    """One context of llama.cpp, used by hand: the convenience class would reuse prefixes."""

    def __init__(self):
        self.llama = llama_cpp.Llama(
            str(MODEL),
            n_ctx=4096,
            n_batch=4096,
            n_ubatch=4096,
            n_threads=1,
            n_threads_batch=2,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            logits_all=False,
            verbose=False,
        )
        self.vocabulary = self.llama.n_vocab()

    def ids(self, text, special):
        return self.llama.tokenize(text.encode("utf-8"), add_bos=False, special=special)

    def last_logits(self, tokens):
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return list(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents)

    def run(self, text):
        tokens = self.ids(text, True)
        self.llama.reset()
        self.llama.eval(tokens)
        row = log_softmax(self.last_logits(tokens))
        order = ranked(row)
        top = [[token, round(row[token], 5)] for token in order[:TOP]]
        greedy = []
        while len(greedy) < CONTINUATION:
            first, second = order[0], order[1]
            greedy.append({"token": first, "lead": round(row[first] - row[second], 5)})
            if first == self.llama.token_eos():
                break
            self.llama.eval([first])
            row = log_softmax(self.last_logits(tokens))
            order = ranked(row)
        return {"token_ids": tokens, "top": top, "greedy": greedy}


def write(name, value):
    # One record a line: a change shows as the line that changed.
    body = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in value["entries"])
    head = json.dumps({key: entry for key, entry in value.items() if key != "entries"})[:-1]
    (HERE / name).write_text(f'{head}, "entries": [\n{body}\n]}}\n', encoding="utf-8")
    print(f"golden: wrote {HERE / name} ({len(value['entries'])} entries)")


def main():
    model = Model()
    made_with = {"made_by": f"llama-cpp-python {llama_cpp.__version__}", "model": MODEL.name}
    strings = [
        {"text": text, "parsed": model.ids(text, True), "plain": model.ids(text, False)} for text in STRINGS
    ]
    write("tokens.json", {**made_with, "entries": strings})
    prompts = [{"name": name, **model.run(text)} for name, text in PROMPTS.items()]
    write("logits.json", {**made_with, "entries": prompts})


if __name__ == "__main__":
    sys.exit(main())
