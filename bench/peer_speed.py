"""Times llama.cpp (llama-cpp-python) on request; the peer of `bench_runtime`.

Reads one JSON question a line ({"what": "prefill" | "decode", "tokens": [...], "steps": n}),
answers with tokens per second. Logits are computed for the last token only.
"""

import json
import sys
import time

from llama_cpp import Llama

model, threads = sys.argv[1], int(sys.argv[2])
llm = Llama(
    model_path=model,
    n_ctx=2048,
    n_batch=512,
    n_ubatch=512,
    n_threads=threads,
    n_threads_batch=threads,
    logits_all=False,
    verbose=False,
)


def prefill(tokens):
    llm.reset()
    llm._ctx.kv_cache_clear()
    start = time.perf_counter()
    llm.eval(tokens)
    return len(tokens) / (time.perf_counter() - start)


def decode(tokens, steps):
    prefill(tokens)
    start = time.perf_counter()
    for _ in range(steps):
        llm.eval([llm.sample(temp=0.0)])
    return steps / (time.perf_counter() - start)


prefill(list(range(1, 65)))
for line in sys.stdin:
    question = json.loads(line)
    if question["what"] == "prefill":
        answer = prefill(question["tokens"])
    else:
        answer = decode(question["tokens"], question["steps"])
    print(answer, flush=True)
