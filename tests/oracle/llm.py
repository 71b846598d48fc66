"""Language models of other programs: fixtures for tests/ett/exchange/llm.rs, and checks by hand.

    llm.py                    write tests/fixtures/llm
    llm.py --check FOLDER     transformers loads a folder that ett wrote, and continues a text
    llm.py --check FOLDER --like OTHER    the same, and its logits are bitwise those of the folder or GGUF file OTHER
    llm.py --smollm2 FILE     write expected.safetensors beside a GGUF file, for the test exchange::llm::smollm2
"""

import argparse
import json
import pathlib
import random
import shutil

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = pathlib.Path(__file__).parent.parent / "fixtures" / "llm"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
MERGES = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("i", "n"), ("r", "e"), ("re", "d")]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters + ["".join(pair) for pair in MERGES]


def tokenizer(special):
    vocab = {token: i for i, token in enumerate(vocabulary())}
    t = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return t


def expected(model, path):
    """Logits of a sequence, and the tokens that follow it."""
    model = (model if next(model.parameters()).dtype == torch.float32 else model.float()).eval()
    vocab = model.config.vocab_size
    ids = torch.tensor([[random.Random(5).randrange(min(vocab, 256)) for _ in range(13)]])
    with torch.no_grad():
        logits = model(ids).logits[0]
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    tensors = {"logits": logits.contiguous(), "ids": ids[0, :13].int(), "next": ids[0, 13:].int()}
    save_file(tensors, path / "expected.safetensors")


def build(cls, config):
    torch.manual_seed(7)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Large enough for the output to depend on the input; norms and biases that are not trivial.
            mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.25)
            p.copy_(torch.randn(p.shape, generator=generator) * std + mean)
    return model


SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.02,
    eos_token_id=264,
    pad_token_id=262,
    bos_token_id=None,
)


def folder(name, cls, config, special=SPECIAL, bf16=False, torch_file=False, **save):
    path = ROOT / name
    shutil.rmtree(path, ignore_errors=True)
    model = build(cls, config)
    if bf16:
        model = model.bfloat16()
    model.save_pretrained(path, **save)
    if torch_file:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    if special is not None:
        tokenizer(special).save(str(path / "tokenizer.json"))
    expected(model, path)


def permuted(w, heads):
    """The rows of queries and keys as llama.cpp's converter orders them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf(name, cls, config, kind, pre):
    path = ROOT / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    model = build(cls, config)
    tokens = vocabulary() + SPECIAL
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
    control = range(len(vocabulary()), len(vocabulary()) + len(SPECIAL))
    types = [3 if i in control else 1 if i < control.start else 5 for i in range(len(tokens))]
    w = GGUFWriter(path / "model.gguf", kind)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges([" ".join(pair) for pair in MERGES])
    w.add_bos_token_id(control.start)
    w.add_eos_token_id(control.start + 2)
    if kind == "llama":
        w.add_vocab_size(config.vocab_size)
        w.add_rope_dimension_count(config.head_dim)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for public, p in model.named_parameters():
        name, a = public, p.detach().numpy().astype(np.float32)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if kind == "llama" and "q_proj" in public:
            a = permuted(a, config.num_attention_heads)
        if kind == "llama" and "k_proj" in public:
            a = permuted(a, config.num_key_value_heads)
        if a.ndim == 1:
            t = Kind.F32
        elif "embed" in public or "v_proj" in public:
            t = Kind.Q8_0
        elif "o_proj" in public or "lm_head" in public:
            t = Kind.F16
        else:
            t = Kind.Q4_1
        a = quants.quantize(np.ascontiguousarray(a), t)
        w.add_tensor(name, a, raw_dtype=t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file="model.gguf", dtype=torch.float32)
    expected(model, path)


def fixtures():
    rope = lambda theta: {"rope_type": "default", "rope_theta": theta}  # noqa: E731
    small = dict(max_position_embeddings=128, vocab_size=272)
    folder("qwen2", Qwen2ForCausalLM, Qwen2Config(
        tie_word_embeddings=True, rope_parameters=rope(1e6), rms_norm_eps=1e-6, **SIZES, **small))
    folder("qwen2-untied", Qwen2ForCausalLM, Qwen2Config(
        tie_word_embeddings=False, rope_parameters=rope(1e4), rms_norm_eps=1e-5, max_position_embeddings=64,
        vocab_size=304, **SIZES), bf16=True, max_shard_size="24KB")
    folder("llama", LlamaForCausalLM, LlamaConfig(
        tie_word_embeddings=False, rope_parameters=rope(5e5), head_dim=16, rms_norm_eps=1e-5, **SIZES, **small))
    folder("mistral", MistralForCausalLM, MistralConfig(
        tie_word_embeddings=False, rope_parameters=rope(1e6), sliding_window=None, head_dim=8, rms_norm_eps=1e-5,
        **SIZES, **small), special=SPECIAL[:3])
    folder("torch", Qwen2ForCausalLM, Qwen2Config(
        tie_word_embeddings=True, rope_parameters=rope(1e6), rms_norm_eps=1e-6, **SIZES, **small),
        special=None, torch_file=True)
    sizes = dict(SIZES, hidden_size=64, intermediate_size=96)
    gguf("gguf-llama", LlamaForCausalLM, LlamaConfig(
        tie_word_embeddings=False, rope_parameters=rope(1e5), head_dim=16, rms_norm_eps=1e-5, **sizes, **small),
        "llama", "smollm")
    gguf("gguf-qwen2", Qwen2ForCausalLM, Qwen2Config(
        tie_word_embeddings=True, rope_parameters=rope(1e6), rms_norm_eps=1e-6, **sizes, **small),
        "qwen2", "qwen2")


def load(path):
    path = pathlib.Path(path)
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def check(path, like):
    path = pathlib.Path(path)
    model = load(path)
    print(type(model).__name__, sum(p.numel() for p in model.parameters()), "parameters")
    ids = torch.tensor([[random.Random(5).randrange(min(model.config.vocab_size, 256)) for _ in range(13)]])
    with torch.no_grad():
        got = model(ids).logits
        assert torch.isfinite(got).all()
        if like:
            want = load(like)(ids).logits
            print("largest difference of logits:", (got - want).abs().max().item(), "of", want.abs().max().item())
            assert torch.equal(got, want)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    print("continued with", out[0, 13:].tolist())
    if (path / "tokenizer.json").exists():
        t = AutoTokenizer.from_pretrained(path)
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
        text = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        ), text
        ids = t(text)["input_ids"]
        assert t.decode(ids) == text, t.decode(ids)
        assert ids.count(t.convert_tokens_to_ids("<|im_start|>")) == 3
        assert (t.eos_token, t.pad_token) == ("<|im_end|>", "<|endoftext|>")
        print(type(t).__name__, len(t), "tokens; a conversation takes", len(ids))


WORDS = (
    "the a red circle square On under 7 12 3.14 2024 1,000,000 x=5 don't I'll we've naïve größer 色 絵 한국어 "
    "привет مرحبا 🟥 👩‍👩‍👧 e\u0301 \u00bd \u2167 \u0663 #tag @me http://a.b/c?d=1 {json: [1]} <html> \\n C++ "
    "ALLCAPS camelCase snake_case -- ... !? 'quoted' \"double\" (round) 50% $9.99 &amp; \u200b \u3000"
).split(" ")
GAPS = [" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n ", "   ", "\r\n", "", "\u00a0"]


def sentences():
    r = random.Random(3)
    def one():
        n = r.randrange(1, 14)
        return "".join(r.choice(GAPS) + r.choice(WORDS) for _ in range(n)) + r.choice(GAPS)
    return [one() for _ in range(4000)]


def smollm2(file):
    file = pathlib.Path(file)
    model = load(file)
    fast = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    # transformers leaves out that this tokenizer takes digits one by one.
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = sentences()
    ids = [fast.encode(t, add_special_tokens=False).ids for t in texts]
    raw = [t.encode() for t in texts]
    prompt = fast.encode("The capital of France is").ids
    out = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(out).logits[0]
        for _ in range(32):
            out = torch.cat([out, model(out).logits[:, -1:].argmax(-1)], 1)
    print(fast.decode(out[0].tolist()))
    i32 = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    save_file(
        {
            "logits": logits.contiguous(), "ids": i32(prompt), "next": out[0, len(prompt):].int(),
            "text": torch.tensor(list(b"".join(raw)), dtype=torch.uint8), "text.lengths": i32([len(x) for x in raw]),
            "tokens": i32([i for x in ids for i in x]), "tokens.lengths": i32([len(x) for x in ids]),
        },
        file.parent / "expected.safetensors",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    p = argparse.ArgumentParser()
    p.add_argument("--check")
    p.add_argument("--like")
    p.add_argument("--smollm2")
    args = p.parse_args()
    if args.check:
        check(args.check, args.like)
    elif args.smollm2:
        smollm2(args.smollm2)
    else:
        fixtures()
