"""How far llama.cpp is from exact arithmetic: the figures behind the tolerances of golden_logits.rs.

Computes the same quantised weights in f32, rounding no activation, with plain numpy (a few seconds a prompt),
and prints the distance of the golden log-probabilities from that. Run it with the peer's Python:

    ~/.cache/colloquy/peer/bin/python tests/golden/exact.py
"""

import json
import os
import struct
from pathlib import Path

import numpy

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("COLLOQUY_CACHE", Path.home() / ".cache/colloquy"))
MODEL = Path(os.environ.get("COLLOQUY_MODEL", CACHE / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
LAYERS, HEADS, KV_HEADS, HEAD_DIM, THETA, EPSILON = 30, 9, 3, 64, 100000.0, 1e-5
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8


class Weights:
    """The tensors of a GGUF file, dequantised when first asked for."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.file = file
            file.read(8)  # Magic and version.
            tensors, keys = self.number("Q"), self.number("Q")
            for _ in range(keys):
                self.string()
                self.value(self.number("I"))
            self.places = {}
            for _ in range(tensors):
                name = self.string()
                shape = [self.number("Q") for _ in range(self.number("I"))]
                self.places[name] = (shape[::-1], self.number("I"), self.number("Q"))
            self.start = -(-file.tell() // 32) * 32
        self.bytes = numpy.memmap(path, dtype=numpy.uint8, mode="r")
        self.cache = {}

    def number(self, kind):
        return struct.unpack("<" + kind, self.file.read(struct.calcsize(kind)))[0]

    def string(self):
        return self.file.read(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(NUMBERS[kind])

    def __getitem__(self, name):
        if name not in self.cache:
            self.cache[name] = self.read(name)
        return self.cache[name]

    def read(self, name):
        shape, kind, offset = self.places[name]
        count, begin = int(numpy.prod(shape)), self.start + offset
        width = {F32: 128, Q4_1: 20, Q8_0: 34}[kind]
        blocks = self.bytes[begin : begin + count // 32 * width].reshape(-1, width)

        def half(at):
            return blocks[:, at : at + 2].copy().view(numpy.float16).astype(numpy.float32)

        if kind == F32:
            values = blocks.copy().view(numpy.float32)
        elif kind == Q8_0:
            values = half(0) * blocks[:, 2:].view(numpy.int8)
        else:
            nibbles = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
            values = half(0) * nibbles + half(2)
        return values.reshape(shape).astype(numpy.float32)


def norm(x, weight):
    return x / numpy.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def rotate(x):  # [T, H, D]; neighbouring values are a pair
    angle = numpy.outer(numpy.arange(len(x)), THETA ** (-numpy.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = numpy.cos(angle)[:, None], numpy.sin(angle)[:, None]
    out = numpy.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def log_probabilities(weights, tokens):
    x, count = weights["token_embd.weight"][tokens], len(tokens)
    mask = numpy.triu(numpy.full((count, count), -numpy.inf), 1)
    for layer in range(LAYERS):

        def weight(name):
            return weights[f"blk.{layer}.{name}.weight"]

        h = norm(x, weight("attn_norm"))
        q = rotate((h @ weight("attn_q").T).reshape(count, HEADS, HEAD_DIM))
        k = rotate((h @ weight("attn_k").T).reshape(count, KV_HEADS, HEAD_DIM))
        v = (h @ weight("attn_v").T).reshape(count, KV_HEADS, HEAD_DIM)
        mixed = numpy.empty_like(q)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, kv].T / numpy.sqrt(HEAD_DIM) + mask
            scores = numpy.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = scores / scores.sum(-1, keepdims=True) @ v[:, kv]
        x = x + mixed.reshape(count, -1) @ weight("attn_output").T
        h = norm(x, weight("ffn_norm"))
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + numpy.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    logits = norm(x[-1], weights["output_norm.weight"]) @ weights["token_embd.weight"].T
    logits = logits.astype(numpy.float64) - logits.max()
    return logits - numpy.log(numpy.exp(logits).sum())


def main():
    weights = Weights(MODEL)
    every = []
    for entry in json.loads((HERE / "logits.json").read_text())["entries"]:
        exact = log_probabilities(weights, entry["token_ids"])
        away = numpy.array([logprob - exact[token] for token, logprob in entry["top"]])
        every.extend(away)
        print(f"{entry['name']}: rms {numpy.sqrt((away**2).mean()):.3f}, worst {abs(away).max():.3f} nats")
    every = numpy.array(every)
    print(f"all: rms {numpy.sqrt((every**2).mean()):.3f}, worst {abs(every).max():.3f} nats")


if __name__ == "__main__":
    main()
