#!/usr/bin/env python3
"""Trains a small Llama with float32 weights from plain texts: a model whose unquantised weights are known.

    python3 tests/train_small.py --text DATA/text/*.txt -o FOLDER [--minutes 60] [--threads 1]

Needs torch, transformers and tokenizers. FOLDER becomes a Hugging Face folder that export.py converts, with
calibration.txt and test.txt in it: the last tenth of every text, which neither the tokenizer nor the model has seen, in
two halves. tests/quality.py measures on these what packing costs.

5.8 million weights: 6 layers of 256 (4 query heads of 64, 2 key heads), hidden 768, a byte-level BPE vocabulary of 4096,
embedding tied; all widths are multiples of 256, so that every type of llama.cpp applies. AdamW with a learning rate that
falls to zero linearly over --minutes of processor time, so that a paused process loses nothing; the folder is written
every tenth of it, so that there is a usable model long before the end. FOLDER/train.log tells how it goes.
"""
import argparse
import math
import os
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

WINDOW, BATCH, VOCAB = 256, 8, 4096


def split(paths, folder):
    """Writes calibration.txt and test.txt; returns what is left to train on, a string for each text."""
    parts = {"train": [], "calibration": [], "test": []}
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        a, b = len(text) * 18 // 20, len(text) * 19 // 20
        for name, part in zip(parts, (text[:a], text[a:b], text[b:])):
            parts[name].append(part)
    for name in "calibration", "test":
        with open(os.path.join(folder, name + ".txt"), "w", encoding="utf-8", newline="\n") as f:
            f.write("\n".join(parts[name]))
    return parts["train"]


def make_tokenizer(texts, folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(True)), trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    return tokenizer


def mean_loss(model, ids, windows=32):
    """Mean negative log-likelihood over `windows` windows spread over `ids`."""
    model.eval()
    starts = torch.linspace(0, len(ids) - WINDOW - 1, windows).long()
    with torch.no_grad():
        x = torch.stack([ids[s:s + WINDOW + 1] for s in starts])
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
    model.train()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of processor time (default 60)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    os.makedirs(args.output, exist_ok=True)
    texts = split(args.text, args.output)
    tokenizer = make_tokenizer(texts, args.output)
    ids = torch.cat([torch.tensor(tokenizer.encode(text).ids + [0]) for text in texts])
    with open(os.path.join(args.output, "test.txt"), encoding="utf-8") as f:
        test = torch.tensor(tokenizer.encode(f.read()).ids)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, initializer_range=0.03))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                  betas=(0.9, 0.98))
    log = open(os.path.join(args.output, "train.log"), "w", buffering=1)
    begin, budget, step, next_save = time.process_time(), args.minutes * 60 * args.threads, 0, 0.1
    done = 0.0
    while done < 1:
        done = min((time.process_time() - begin) / budget, 1)
        rate = 2e-3 * min((step + 1) / 100, 1) * max(1 - done, 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH,))
        x = torch.stack([ids[s:s + WINDOW + 1] for s in starts])
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0 or done >= 1:
            log.write("step %d, %.1f%%: loss %.4f\n" % (step, 100 * done, loss.item()))
        if done >= next_save or done >= 1:
            next_save += 0.1
            model.save_pretrained(args.output)
            held = mean_loss(model, test)
            log.write("saved; on test.txt %.4f, perplexity %.2f; %.2f epochs\n" % (
                held, math.exp(held), step * BATCH * WINDOW / len(ids)))


if __name__ == "__main__":
    main()
