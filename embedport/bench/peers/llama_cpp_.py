# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"]
# ///
"""The peer: llama.cpp through llama-cpp-python, compiled on this machine.

Needs cmake and a C++ compiler.

uv run --script llama_cpp_.py prepare q8_0|q4_k_m CHECKPOINT OUT
uv run --script llama_cpp_.py serve KIND FOLDER THREADS
uv run --script llama_cpp_.py warm
"""

import ctypes
import json
from pathlib import Path

import serving

PACKAGES = ("llama-cpp-python", "gguf")
FILE = "model.gguf"
# Tokens per call and in its KV cache; rows per call.
TOKENS, ROWS = 4096, 64
# Token types in a GGUF file.
NORMAL, CONTROL = 1, 3


def prepare(kind, checkpoint, out):
    """Write the checkpoint as GGUF in fp16, then quantize it with llama.cpp."""
    import llama_cpp

    unquantized = Path(out) / "f16.gguf"
    write_gguf(Path(checkpoint), unquantized)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }[kind]
    quantized = str(Path(out) / FILE).encode()
    if llama_cpp.llama_model_quantize(str(unquantized).encode(), quantized, ctypes.byref(options)):
        raise SystemExit(f"llama.cpp did not quantize {unquantized}")
    unquantized.unlink()


def write_gguf(checkpoint, path):
    """Write the checkpoint's tensors and tokenizer as GGUF, architecture qwen3."""
    import gguf
    import numpy as np

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_pooling_type(gguf.PoolingType.LAST)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, checkpoint, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, values in read_tensors(checkpoint):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        full_name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        dtype = np.float16 if values.ndim == 2 else np.float32
        writer.add_tensor(names.get_name(full_name, (".weight",)), values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, checkpoint, vocab_size):
    """Add the tokenizer: byte-level BPE with Qwen's pre-tokenization."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens |= added
    ids = range(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([CONTROL if i in added or i not in tokens else NORMAL for i in ids])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    end = next(i for i, token in added.items() if token == "<|endoftext|>")
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)


def read_tensors(checkpoint):
    """Yield (name, fp32 or fp16 values) from all safetensors files."""
    import numpy as np

    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, mode="r")
        start = 8 + int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            low, high = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[low:high], dtypes[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values


def serve(kind, folder, threads):
    """Run rows as separate sequences of one call, without padding."""
    del kind
    import llama_cpp
    import numpy as np

    model = llama_cpp.llama_model_load_from_file(
        str(Path(folder) / FILE).encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = TOKENS
    options.n_seq_max = ROWS
    options.n_threads = options.n_threads_batch = int(threads)
    options.embeddings = True
    options.kv_unified = True
    options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST
    context = llama_cpp.llama_init_from_model(model, options)
    width = llama_cpp.llama_model_n_embd(model)
    batch = llama_cpp.llama_batch_init(TOKENS, 0, 1)

    def call(rows):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        at = 0
        for number, row in enumerate(rows):
            for position, token in enumerate(row):
                batch.token[at] = int(token)
                batch.pos[at] = position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = number
                batch.logits[at] = 1
                at += 1
        batch.n_tokens = at
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode failed on {at} tokens")
        for number in range(len(rows)):
            pointer = llama_cpp.llama_get_embeddings_seq(context, number)
            vector = np.ctypeslib.as_array(pointer, shape=(width,)).copy()
            yield vector / np.linalg.norm(vector)

    def forward(rows):
        vectors, group = [], []
        for row in rows:
            if group and sum(map(len, group)) + len(row) > TOKENS:
                vectors += call(group)
                group = []
            group.append(row)
        return [*vectors, *call(group)]

    used = llama_cpp.llama_n_threads_batch(context)
    serving.serve(lambda rows, count: serving.in_batches(rows, min(count, ROWS), forward), used)


if __name__ == "__main__":
    serving.main(prepare, serve, PACKAGES, ("llama_cpp",))
