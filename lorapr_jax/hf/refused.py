"""Model families that are known and not supported, and why."""

_LINEAR = 'it has linear attention or a state space'
_LATENT = 'it has latent attention (MLA)'
_EXPERTS = 'it has a mixture of experts'
_LAYER_NORM = 'it has LayerNorm, or attention and MLP side by side'
_NO_GATE = 'its MLP has no gate'
_IMAGES = (
  'it reads images or sound too: save its text model alone with transformers'
)
_BOTH = 'it has an encoder and a decoder'

_REASONS = {
  _LINEAR: (
    'bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 '
    'lfm2_moe mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe '
    'qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba '
    'zamba2'
  ),
  _LATENT: (
    'deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite '
    'glm_moe_dsa kimi_k2 kimi_k25 longcat_flash minicpm3 mistral4 youtu'
  ),
  _EXPERTS: (
    'afmoe dbrx dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe '
    'granitemoeshared hunyuan_v1_moe jetmoe llama4 llama4_text '
    'minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open'
  ),
  _LAYER_NORM: (
    'bloom codegen cohere cohere2 falcon gpt2 gpt_bigcode gpt_neo gpt_neox '
    'gptj jais2 mpt nemotron olmo opt persimmon phi stablelm starcoder2 xglm'
  ),
  _NO_GATE: 'apertus arcee nanochat',
  _IMAGES: (
    'gemma3n gemma4 glm4v glm46v internvl llava llava_next mistral3 mllama '
    'paligemma phi4_multimodal qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_vl '
    'qwen3_omni_moe qwen3_vl qwen3_vl_moe smolvlm'
  ),
  _BOTH: 'bart marian mbart mt5 pegasus t5 t5gemma umt5',
  'layers share keys and values, and every layer has embeddings of its own': (
    'gemma3n_text gemma4_text'
  ),
  'a softmax has an offset or sinks': 'flint granite_swa',
  'its attention is a difference of two': 'diffllama',
  'its weights are ternary': 'bitnet',
  'its norms are optional, and logits are multiplied': 'hyperclovax',
  'its tensors have names of their own: take the folder of the same model '
  'whose name ends in -hf': 'chatglm',
  'its tensors have names of their own: save it with transformers first': (
    'baichuan exaone internlm2 qwen xverse'
  ),
}
_REASON_OF = {
  name: reason for reason, names in _REASONS.items() for name in names.split()
}


def why_refused(model_type: str) -> str | None:
  """What of a family is not supported; None where that is not known."""
  return _REASON_OF.get(model_type)
