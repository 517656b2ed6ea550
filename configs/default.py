"""Every setting, with its default. The other configs start from this one.

python train.py --config=configs/X.py --workdir=DIR --config.prune.target=0.3
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The paper's where it has one, but for lora_gradient and compensate.

  configs/paper.py has those too (docs/method.md).
  """
  config = config_dict.ConfigDict()

  config.model = config_dict.ConfigDict()
  # A Hugging Face folder: llama, mistral without sliding window, or our own
  # export. Empty: random weights of the sizes below.
  config.model.path = ''
  # The keys of a config.json, for random weights.
  config.model.sizes = config_dict.ConfigDict()
  # Of the frozen weights: float32, bfloat16, or auto: bfloat16 on GPU and TPU,
  # float32 on CPU, whose bfloat16 products are slow. int8: the projections are
  # int8 values with a scale for each output, but for those that
  # prune.compensate=ridge repairs; all else, and what is merged, as with auto.
  config.model.base_dtype = 'auto'
  # Of activations: float32, bfloat16, or auto as above. LoRA's weights, the
  # optimiser and the scores are always float32.
  config.model.compute_dtype = 'auto'
  # Of the operands of the training step's products with weights, whose sums are
  # float32: float32, bfloat16, or auto: compute_dtype, but bfloat16 on a CPU
  # with instructions for it (AVX512-BF16, AMX). Evaluation has compute_dtype.
  config.model.matmul_dtype = 'auto'
  # How attention is computed: xla, cudnn (GPU), splash (TPU), or auto: the
  # kernel that fits device, dtype and sizes, else xla.
  config.model.attention = 'auto'
  # What the backward pass keeps: blocks (each block's input), offload (the
  # same, in the host's memory), dots (the projections' outputs too: a third
  # fewer operations) or none (all activations). docs/performance.md has what
  # each costs.
  config.model.remat = 'blocks'
  # Whether the training step is a loop over the layers. Without it each layer
  # is compiled apart: a faster step on a GPU, compiled several times as long
  # (docs/performance.md).
  config.model.scan_layers = True

  config.data = config_dict.ConfigDict()
  # A data spec (docs/data.md): file:, tfds:, hf:, demo:news: or synthetic:; or
  # a mixture, '0.7*tfds:c4?column=text + 0.3*file:alpaca.jsonl'.
  config.data.train = ''
  # What makes a text of a record: a Jinja template over its fields, or chat:
  # the tokenizer's chat template over messages or conversations. Empty: the
  # spec's text column is the text (docs/data.md).
  config.data.template = ''
  # A Jinja template of the answer, which follows the template's text.
  config.data.response = ''
  # The tokens that count in the loss: all, or response.
  config.data.loss = 'all'
  # documents (whole ones share a window, none sees another) or concatenate
  # (all end to end, as the papers do for C4).
  config.data.packing = 'documents'
  # Of each spec no more tokens are packed; 0: all are.
  config.data.max_tokens = 0
  # Whether windows are shuffled, anew in every epoch.
  config.data.shuffle = True
  # A data spec of held-out text; empty: no perplexities.
  config.data.eval = ''
  # Tokens a window of the held-out text; 0: train.seq_len.
  config.data.eval_seq_len = 0
  # At most so many windows of it; 0: all.
  config.data.eval_windows = 0
  # Steps between perplexities of the masked, adapted model; 0: none of these.
  config.data.eval_every = 0

  config.lora = config_dict.ConfigDict()
  # Of A and B.
  config.lora.rank = 8
  # The update is alpha / rank times A B.
  config.lora.alpha = 16.0
  # Of LoRA's input.
  config.lora.dropout = 0.05
  # all, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.
  config.lora.targets = 'all'

  config.train = config_dict.ConfigDict()
  # Optimiser steps.
  config.train.steps = 1000
  # Sequences a step.
  config.train.batch_size = 128
  # Sequences at a time; their gradients are added up to a step's.
  config.train.micro_batch_size = 4
  # Tokens a sequence.
  config.train.seq_len = 512
  # AdamW's, at the first step.
  config.train.learning_rate = 1e-4
  # linear or cosine (to 0 at the last step), or constant.
  config.train.lr_schedule = 'linear'
  # The gradients' largest global norm.
  config.train.clip_norm = 1.0
  # Of LoRA's initialisation, dropout and the order of the data.
  config.train.seed = 0
  # Tokens whose logits exist at the same time; 0: 128 (512 on GPU and TPU) for
  # each device of the axes data, fsdp and sequence.
  config.train.loss_chunk = 0
  # The share of the loss that is the divergence from the dense model's
  # predictions; the rest is the loss on the text (docs/alternatives.md).
  config.train.distill = 0.0
  # With distill: how many of the dense model's most probable tokens are
  # remembered for each token. All others count as one.
  config.train.distill_top_k = 64
  # Of XLA, for the training step: NAME=VALUE,... beside its own defaults
  # (docs/scaling.md has what some change).
  config.train.compiler_options = ''
  # Steps between lines of metrics.jsonl.
  config.train.log_every = 10
  # Steps between checkpoints.
  config.train.checkpoint_every = 100
  # The newest so many stay.
  config.train.checkpoints_kept = 2

  config.prune = config_dict.ConfigDict()
  # lora (LoRAPrune), gradient (of the base: a second copy of its weights),
  # activation (Wanda-sp), magnitude or random.
  config.prune.criterion = 'lora'
  # joint (prune while LoRA trains), prune_then_tune (prune at once, then train
  # LoRA on what is left, for as many steps in all) or none (prune at once).
  config.prune.order = 'joint'
  # The first steps of the other two orders: they only measure importance.
  config.prune.calibration_steps = 10
  # The share to remove, of what `unit` says; 0: LoRA is trained, no more.
  config.prune.target = 0.5
  # The share of heads, where it differs from target.
  config.prune.heads_target = config_dict.placeholder(float)
  # The share of channels, where it differs from target.
  config.prune.channels_target = config_dict.placeholder(float)
  # groups (of the layers that are not protected) or params (of the model).
  config.prune.unit = 'groups'
  # kv_groups (KV heads with their query heads), queries (query heads, as many
  # under every KV head) or none.
  config.prune.heads = 'kv_groups'
  # Whether channels of the feed-forward networks are pruned.
  config.prune.channels = True
  # Steps between maskings.
  config.prune.every = 10
  # The share of the steps before the cubic ramp.
  config.prune.warmup = 0.1
  # The share of the steps after it.
  config.prune.cooldown = 0.1
  # What makes up for groups each time they are masked, in o_proj and down_proj:
  # ridge (what survives, in closed form from the inputs of the newest batches),
  # bias (one that is the mean of what they gave; exports as mistral have none)
  # or none (LoRAPrune).
  config.prune.compensate = 'ridge'
  # Of ridge: the ridge, in units of the projection's mean squared input.
  config.prune.compensate_damping = 0.2
  # The newest batches whose tokens are the inputs.
  config.prune.compensate_batches = 2
  # When masked groups are really cut out, so that what is left trains faster:
  # end; ascending shares of the ramp, such as 0.5,0.8 (joint only); or auto,
  # those that save most time.
  config.prune.shrink = 'end'
  # reference (the first tenth of the layers and the last one) or none.
  config.prune.protect = 'reference'
  # How what is removed is shared out over depth: relative shares, of the first
  # layers to the last, such as 0.5,1,1.5, each for a block of the layers that
  # are not protected. Of each group as many go in all (docs/targets.md).
  config.prune.layer_profile = '1'
  # The heads kept are a multiple of this (query heads a layer under queries).
  config.prune.heads_multiple_of = 1
  # The channels kept are a multiple of this.
  config.prune.channels_multiple_of = 1
  # abs or square of the first-order term.
  config.prune.score = 'abs'
  # Whether each projection's group vector is divided by its L2 norm.
  config.prune.norm = True
  # What criterion lora takes for a weight's gradient: full, the paper's A gB +
  # gA B - gA gB; or own, A gB where the groups are outputs and gA B where they
  # are inputs (docs/method.md).
  config.prune.lora_gradient = 'own'
  # Of the moving average over steps.
  config.prune.decay = 0.9

  config.recover = config_dict.ConfigDict()
  # Steps of LoRA after the cut, on the small arrays.
  config.recover.steps = 0
  # Their text; empty: data.train goes on.
  config.recover.data = ''
  # At the first of them; 0: train.learning_rate.
  config.recover.learning_rate = 0.0

  config.mesh = config_dict.ConfigDict()
  # Devices that each hold the whole base and their share of a batch; -1: the
  # rest of the devices.
  config.mesh.data = 1
  # Devices that share the base's weights and a batch.
  config.mesh.fsdp = -1
  # Devices that share the tokens of every sequence, for long ones
  # (docs/scaling.md); each gathers the keys and values of all.
  config.mesh.sequence = 1
  # Devices that share heads and channels.
  config.mesh.tensor = 1

  config.export = config_dict.ConfigDict()
  # hf (always written), and after a comma gguf, peft (LoRA as an adapter over
  # the pruned base) or both: 'hf,gguf,peft'.
  config.export.format = 'hf'
  # uniform (llama or mistral; every layer the same size), two_shape (remote
  # code; layers may differ), padded (llama or mistral at the size before the
  # cut, zeros where members were removed) or auto: uniform where it can be.
  config.export.layout = 'auto'
  # llama, mistral (which has no biases), or auto: llama wherever transformers
  # takes it.
  config.export.model_type = 'auto'
  # float32, bfloat16, float16, or auto: as the base was loaded.
  config.export.dtype = 'auto'
  # Of the GGUF: f32, f16, bf16, q8_0, or auto: as export.dtype.
  config.export.gguf_dtype = 'auto'
  # Of one weights file: a number and B, KB, MB, GB, KiB, MiB or GiB.
  config.export.max_shard_size = '5GB'

  config.log = config_dict.ConfigDict()
  # Whether TensorBoard's files are written too, to workdir/tensorboard.
  config.log.tensorboard = False
  # A Weights & Biases project to log to (pip install wandb); empty: none.
  config.log.wandb = ''

  config.report = config_dict.ConfigDict()
  # Texts that the dense and the pruned model go on from, side by side.
  config.report.prompts = ('The weather today', 'The president said')
  # At most so many tokens after each.
  config.report.max_new_tokens = 48
  # A config that sets a key which is not here is mistaken.
  return config.lock()
