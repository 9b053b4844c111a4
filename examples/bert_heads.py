"""Which attention heads a BERT-like classifier can do without: it tells torch's docstrings from NumPy's.

Run: python examples/bert_heads.py
"""

import re
import zlib

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import prunefront

LENGTH, VOCABULARY = 32, 4096


def sentences(module: object) -> list[str]:
    found = (getattr(module, name).__doc__ for name in dir(module))
    parts = (part.strip() for text in found if isinstance(text, str) for part in text.split("\n\n"))
    return sorted({part for part in parts if len(part) > 60})


def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Words as their hashes; 0 pads."""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = re.findall(r"[a-z]+", text.lower().replace("torch", "").replace("numpy", "").replace("np", ""))[:LENGTH]
        row[: len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def batches(size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Shuffled batches, with labels; 0: torch, 1: NumPy."""
    ours, theirs = sentences(torch)[:1200], sentences(np)[:1200]
    labels = torch.tensor([0] * len(ours) + [1] * len(theirs))
    order = torch.randperm(len(labels))
    tokens = encoded(ours + theirs) | {"labels": labels}
    return [{key: value[rows] for key, value in tokens.items()} for rows in order.split(size)]


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def main() -> None:
    torch.manual_seed(0)
    data = batches()
    testing, searching, training = data[:6], data[6:12], data[12:]
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        for batch in training:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()

    def right(output, batch) -> torch.Tensor:
        return output.logits.argmax(1) == batch["labels"]

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            return torch.cat([right(candidate(**inputs(batch)), batch) for batch in testing]).float().mean().item()

    space = prunefront.discover(model, inputs(data[0]), kinds=["head"], calibration=[inputs(b) for b in training[:8]])
    result = prunefront.search(
        model,
        inputs(data[0]),
        score=prunefront.SampleScore(searching, right),
        test=accuracy,
        mode="front",
        n_trials=25,
        run_dir="runs/bert_heads",
        space=space,
    )
    print(f"dense: {accuracy(model):.3f} with 8 heads in each of 4 layers")
    for entry in result.front:
        print(f"{entry.name}: {entry.metrics['test']:.3f} with {list(entry.plan.widths.values())}")


if __name__ == "__main__":
    main()
