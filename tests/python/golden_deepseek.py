"""Makes tests/fixtures/models/deepseek-v2 and deepseek-v3: tiny models of random weights, and what transformers computes with them.

    python tests/python/golden_deepseek.py

Needs `pip install torch==2.15.0 transformers==5.24.0 safetensors==0.8.0` (torch for CPUs is enough). The tokenizer is that of the fixture
llama. Weights are rounded to bfloat16 and written under the names that DeepSeek's files have; config.json of V2 is in the layout of
DeepSeek's own files, that of V3 in transformers'. `expected.json` holds what transformers makes of the written folder in float32.
"""

import json
import pathlib
import shutil

import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
TEXT = "The quick brown fox jumps over the lazy dog; the geese fly on."
GREEDY = 24
# A greedy step whose two best ids are closer than this would be no test.
LEAST_MARGIN = 0.02

SHARED = {
    "vocab_size": 512,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Compressed queries; sigmoid scores with a bias, the best group of two.
V3 = SHARED | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "dtype": "bfloat16",
}
# Queries made at once; softmax scores, the two best groups of four; values wider than keys; an amplitude of YaRN other than 1.
V2 = SHARED | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.2,
        "mscale_all_dim": 0.707,
    },
    "torch_dtype": "bfloat16",
}


def weights(config, seed):
    """Random tensors, of about unit gain, in bfloat16."""
    torch.manual_seed(seed)
    c, tensors = config, {}
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]

    def matrix(name, rows, columns, gain=1.0):
        tensors[f"{name}.weight"] = (torch.randn(rows, columns) * gain / columns**0.5).bfloat16()

    def norm(name, size):
        tensors[f"{name}.weight"] = (1 + 0.2 * torch.randn(size)).bfloat16()

    def block(name, width):
        matrix(f"{name}.gate_proj", width, hidden, 1.5)
        matrix(f"{name}.up_proj", width, hidden, 1.5)
        matrix(f"{name}.down_proj", hidden, width)

    matrix("model.embed_tokens", c["vocab_size"], hidden, hidden**0.5)
    matrix("lm_head", c["vocab_size"], hidden, 2.0)
    norm("model.norm", hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm", hidden)
        norm(f"{at}.post_attention_layernorm", hidden)
        if c["q_lora_rank"]:
            matrix(f"{at}.self_attn.q_a_proj", c["q_lora_rank"], hidden)
            norm(f"{at}.self_attn.q_a_layernorm", c["q_lora_rank"])
            matrix(f"{at}.self_attn.q_b_proj", heads * key, c["q_lora_rank"], 1.5)
        else:
            matrix(f"{at}.self_attn.q_proj", heads * key, hidden, 1.5)
        matrix(f"{at}.self_attn.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        norm(f"{at}.self_attn.kv_a_layernorm", c["kv_lora_rank"])
        matrix(f"{at}.self_attn.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"], 1.5)
        matrix(f"{at}.self_attn.o_proj", hidden, heads * c["v_head_dim"])
        if layer < c["first_k_dense_replace"]:
            block(f"{at}.mlp", c["intermediate_size"])
            continue
        matrix(f"{at}.mlp.gate", c["n_routed_experts"], hidden, 2.0)
        if c["model_type"] == "deepseek_v3":
            tensors[f"{at}.mlp.gate.e_score_correction_bias"] = 0.3 * torch.randn(c["n_routed_experts"])
        block(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        for expert in range(c["n_routed_experts"]):
            block(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def numbers(values):
    return [round(float(x), 6) for x in values]


@torch.no_grad()
def make(name, config, seed):
    folder = MODELS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copyfile(MODELS / "llama" / file, folder / file)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.torch.save_file(weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]), info
    model.eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:20]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    greedy, margins, all_ids = [], [], list(ids)
    for _ in range(GREEDY):
        last = model(torch.tensor([all_ids]), use_cache=False).logits[0, -1]
        best = last.topk(2)
        greedy.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 5))
        all_ids.append(greedy[-1])
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    expected = {
        "source": f"transformers {transformers.__version__}, torch {torch.__version__}, float32 eager; weights rounded to bfloat16 first",
        "seed": seed,
        "text": TEXT,
        "input_ids": ids,
        "greedy_ids": greedy,
        "greedy_margins": margins,
        "last_logits": numbers(logits[-1]),
        "logits_first8_each_position": [numbers(row[:8]) for row in logits],
        "nll_per_token": numbers(losses),
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    return min(margins), len(set(greedy))


print(transformers.__version__, torch.__version__)
for name, config in [("deepseek-v3", V3), ("deepseek-v2", V2)]:
    for seed in range(100):
        margin, different = make(name, config, seed)
        if margin >= LEAST_MARGIN and different > GREEDY // 2:
            print(f"{name}: seed {seed}, least margin {margin}, {different} different ids")
            break
