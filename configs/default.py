"""Every setting, with its default. The other configs start from this one.

python train.py --config=configs/X.py --workdir=DIR --config.prune.target=0.3
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The paper's values, but for four keys of prune.

  They are criterion, order, compensate and lora_gradient: docs/alternatives.md
  has what was measured, and configs/paper.py the paper's values of these too.
  """
  config = config_dict.ConfigDict()

  config.model = config_dict.ConfigDict()
  # The base: a Hugging Face folder of one of the families of docs/models.md, or
  # one that a run exported. Empty: random weights of the sizes below.
  config.model.path = ''
  # The sizes of a model with random weights: the keys of a config.json.
  config.model.sizes = config_dict.ConfigDict()
  # The dtype of the frozen weights: float32, bfloat16, int8 or auto. auto is
  # bfloat16 on GPU and TPU, and float32 on CPU, where bfloat16 products are
  # slow. With int8 each projection is int8 values and a scale for each output.
  # The projections that prune.compensate=ridge repairs, all other weights and
  # what is merged are as with auto.
  config.model.base_dtype = 'auto'
  # The dtype of the activations: float32, bfloat16, or auto as above. LoRA's
  # weights, the optimiser and the scores are always float32.
  config.model.compute_dtype = 'auto'
  # The dtype of the operands of the training step's products with weights:
  # float32, bfloat16 or auto. Their sums are float32. auto is compute_dtype,
  # but bfloat16 on a CPU with instructions for it (AVX512-BF16, AMX).
  # Evaluation uses compute_dtype.
  config.model.matmul_dtype = 'auto'
  # How attention is computed: xla, cudnn (GPU), splash (TPU) or auto. auto is
  # the kernel that fits device, dtype and sizes, and xla where none does.
  config.model.attention = 'auto'
  # What is kept for the backward pass: blocks (each block's input), offload
  # (the same, in the host's memory), dots (the projections' outputs too: a
  # third fewer operations) or none (all activations). docs/performance.md has
  # what each costs.
  config.model.remat = 'blocks'
  # Whether the training step is a loop over the layers. Without the loop each
  # layer is compiled by itself: the step is faster on a GPU, and compiles
  # several times as long (docs/performance.md).
  config.model.scan_layers = True

  config.data = config_dict.ConfigDict()
  # The training text: a data spec (docs/data.md), which begins with file:,
  # tfds:, hf:, demo:news: or synthetic:, or a mixture of specs with weights:
  # '0.7*tfds:c4?column=text + 0.3*file:alpaca.jsonl'.
  config.data.train = ''
  # How a record becomes a text: a Jinja template over its fields, or chat, the
  # tokenizer's chat template over its messages or conversations. Empty: the
  # text is the spec's text column (docs/data.md). In a flag, \n is a line end
  # and \t a tab.
  config.data.template = ''
  # A Jinja template of the answer, which follows the template's text. In a
  # flag, \n and \t are as above.
  config.data.response = ''
  # The tokens that count in the loss: all or response.
  config.data.loss = 'all'
  # How windows are filled: documents (whole documents share a window, and none
  # sees another) or concatenate (documents end to end, as the papers do for
  # C4).
  config.data.packing = 'documents'
  # The most tokens that are packed from each spec; 0: all.
  config.data.max_tokens = 0
  # Whether the windows are shuffled, anew in every epoch.
  config.data.shuffle = True
  # The held-out text, a data spec. Empty: no perplexities are measured.
  config.data.eval = ''
  # Tokens in a window of the held-out text; 0: train.seq_len.
  config.data.eval_seq_len = 0
  # The most windows of the held-out text that are scored; 0: all.
  config.data.eval_windows = 0
  # Steps between perplexities of the model in training, with its masks and
  # adapters; 0: it is not measured in training.
  config.data.eval_every = 0

  config.lora = config_dict.ConfigDict()
  # The rank of A and B.
  config.lora.rank = 8
  # The update is alpha / rank times A B.
  config.lora.alpha = 16.0
  # The dropout rate of LoRA's input.
  config.lora.dropout = 0.05
  # The projections that get adapters: all, or some of
  # q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.
  config.lora.targets = 'all'

  config.train = config_dict.ConfigDict()
  # The number of optimiser steps.
  config.train.steps = 1000
  # Sequences in a step.
  config.train.batch_size = 128
  # Sequences that are computed at the same time. The gradients of a step's
  # micro-batches are added up.
  config.train.micro_batch_size = 4
  # Tokens in a sequence.
  config.train.seq_len = 512
  # AdamW's learning rate at the first step.
  config.train.learning_rate = 1e-4
  # The learning rate after that: linear or cosine (to 0 at the last step), or
  # constant.
  config.train.lr_schedule = 'linear'
  # The largest global norm of the gradients.
  config.train.clip_norm = 1.0
  # The seed of LoRA's initialisation, of dropout and of the order of the data.
  config.train.seed = 0
  # Tokens whose logits exist at the same time; 0: 128 (512 on GPU and TPU) for
  # each device of the mesh axes data, fsdp and sequence.
  config.train.loss_chunk = 0
  # The share of the loss that is the divergence from the dense model's
  # predictions; the rest is the loss on the text (docs/alternatives.md).
  config.train.distill = 0.0
  # With distill: how many of the dense model's most probable tokens are
  # remembered for each token. All others count as one.
  config.train.distill_top_k = 64
  # XLA options for the training step, NAME=VALUE,..., beside XLA's own defaults
  # (docs/scaling.md has what some change).
  config.train.compiler_options = ''
  # Steps between lines of metrics.jsonl.
  config.train.log_every = 10
  # Steps between checkpoints.
  config.train.checkpoint_every = 100
  # Keep the newest N checkpoints.
  config.train.checkpoints_kept = 2

  config.prune = config_dict.ConfigDict()
  # What scores the groups: obs (what is lost when they go and the rest is
  # repaired), lora (LoRAPrune), gradient (the gradient of the base, which takes
  # as much memory as a second copy of its weights), activation (Wanda-sp),
  # fluctuation (FLAP), magnitude or random.
  config.prune.criterion = 'obs'
  # When groups are pruned: prune_then_tune (all at once, then LoRA trains on
  # what is left, for as many steps in all), joint (on a ramp, while LoRA
  # trains) or none (all at once, and LoRA does not train).
  config.prune.order = 'prune_then_tune'
  # Under prune_then_tune and none: the steps before groups go. LoRA does not
  # train in them. Criteria lora and gradient are averaged over them; for the
  # others the newest of their batches are what groups are measured on.
  config.prune.calibration_steps = 10
  # Under prune_then_tune, with export.ladder: the steps that each of its sizes
  # is trained for, such as 100,100; what is left of train.steps is the last
  # size's. Empty: all sizes get an equal share of the steps after
  # calibration_steps.
  config.prune.rung_steps = ''
  # The share to remove, in the unit below; 0: nothing is pruned, and LoRA
  # trains alone. Unset: 0.5, where neither fit nor speedup says how much.
  config.prune.target = config_dict.placeholder(float)
  # The share of heads to remove, where it differs from target.
  config.prune.heads_target = config_dict.placeholder(float)
  # The share of channels to remove, where it differs from target.
  config.prune.channels_target = config_dict.placeholder(float)
  # The share of whole layers to remove, of those that are not protected; 0:
  # none. With prune.heads=none and prune.channels=False they go alone. With
  # unit=params they are a part of what target says; with fit or speedup, heads
  # and channels of the layers that stay make up the rest.
  config.prune.layers_target = 0.0
  # How whole layers are scored: loss (the loss on a few tokens if the layer is
  # gone too, one layer after the other), cosine (1 - cos of its input and
  # output) or sum (what criterion lora or gradient gives its weights).
  config.prune.layers_criterion = 'loss'
  # What target is a share of: groups (the heads and channels of the layers that
  # are not protected and stay) or params (all parameters of the model).
  config.prune.unit = 'groups'
  # In place of target: the largest model is kept whose weights and KV cache
  # take no more than this, in all: a number and B, KB, MB, GB, KiB, MiB or GiB,
  # such as 8GB. Heads and channels share the cut as with unit=params; where
  # neither is pruned, the fewest layers go with which it fits.
  config.prune.fit = ''
  # With fit: the tokens of a text in the KV cache; 0: as many as the model has
  # positions. A layer with a window keeps no more than its window.
  config.prune.fit_context = 0
  # With fit: how many texts there are in the KV cache.
  config.prune.fit_batch = 1
  # With fit: the dtype of weights and cache: float32, bfloat16, float16 or
  # int8. With int8 each projection is int8 values and a float32 scale for each
  # output, and all else is bfloat16.
  config.prune.fit_dtype = 'bfloat16'
  # In place of target: the largest model is kept that runs so many times as
  # fast as the dense one, such as 1.5, by the command benchmark on the first
  # device of the run. Up to six sizes with random weights are timed before the
  # run, and remembered (docs/targets.md).
  config.prune.speedup = config_dict.placeholder(float)
  # With speedup: what is to be so fast: decode (each token after the first) or
  # prefill (the prompt).
  config.prune.speedup_of = 'decode'
  # Which heads are pruned: kv_groups (KV heads, each with its query heads),
  # queries (query heads, as many under every KV head) or none.
  config.prune.heads = 'kv_groups'
  # Whether channels of the feed-forward networks are pruned.
  config.prune.channels = True
  # Under joint: steps between maskings.
  config.prune.every = 10
  # Under joint: the share of the steps that comes before the ramp; nothing is
  # masked in it.
  config.prune.warmup = 0.1
  # Under joint: the share of the steps that comes after the ramp.
  config.prune.cooldown = 0.1
  # What makes up for groups each time they are masked: ridge (the weights of
  # o_proj and down_proj that survive, by ridge regression) or none (LoRAPrune).
  config.prune.compensate = 'ridge'
  # Each time groups are masked they are measured (by obs, activation and
  # fluctuation) and repaired on N batches. 0: so many that the
  # passes over them take a quarter of the operations of the steps, but no more
  # than 131,072 tokens or two batches each time, nor than there are before the
  # first event.
  config.prune.compensate_batches = 0
  # The text that these batches are of, a data spec or a mixture; a repair holds
  # for text like it. Empty: the newest batches of data.train.
  config.prune.compensate_data = ''
  # Under joint: when masked groups are cut: end (once, at the end), shares of
  # the ramp in ascending order, such as 0.5,0.8 (on the way too, so that what
  # is left trains faster), or auto (the cuts on the way that save most time if
  # a cut takes as long as 20 steps; docs/performance.md).
  config.prune.shrink = 'end'
  # The layers that are not pruned: reference (the first tenth of the layers and
  # the last one) or none.
  config.prune.protect = 'reference'
  # How what is removed is spread over depth: relative shares from the first
  # layers to the last, such as 0.5,1,1.5, each for an equal part of the layers
  # that are not protected. In all, as many groups of each kind go as without it
  # (docs/targets.md).
  config.prune.layer_profile = '1'
  # The number of heads kept is a multiple of this (under queries, the query
  # heads of a layer).
  config.prune.heads_multiple_of = 1
  # The number of channels kept is a multiple of this.
  config.prune.channels_multiple_of = 1
  # The score of an element: abs or square of the first-order term.
  config.prune.score = 'abs'
  # Whether each projection's vector of group scores is divided by its L2 norm.
  config.prune.norm = True
  # What criterion lora takes as a weight's gradient: own (A gB where the groups
  # are outputs, gA B where they are inputs) or full (the paper's A gB + gA B -
  # gA gB). See docs/method.md.
  config.prune.lora_gradient = 'own'
  # The weight of the old average in the moving average of the scores.
  config.prune.decay = 0.9

  config.recover = config_dict.ConfigDict()
  # Steps of LoRA after the cut, on the smaller arrays.
  config.recover.steps = 0
  # The text of these steps, a data spec. Empty: data.train goes on.
  config.recover.data = ''
  # The learning rate at the first of these steps; 0: train.learning_rate.
  config.recover.learning_rate = 0.0

  config.mesh = config_dict.ConfigDict()
  # Devices that each hold the whole base and take a part of the batch; -1: all
  # devices that are left.
  config.mesh.data = 1
  # Devices that divide the base's weights and the batch among them; -1: all
  # devices that are left.
  config.mesh.fsdp = -1
  # Devices that divide the tokens of every sequence among them, for long
  # sequences (docs/scaling.md). Each gathers the keys and values of all.
  config.mesh.sequence = 1
  # Devices that divide heads and channels among them.
  config.mesh.tensor = 1

  config.export = config_dict.ConfigDict()
  # The formats to export: hf (always written), and after a comma gguf, peft
  # (LoRA as an adapter over the pruned base) or both: 'hf,gguf,peft'.
  config.export.format = 'hf'
  # How the folder stores the sizes of its layers: uniform (a stock model; every
  # layer has the same size), two_shape (remote code; layers may differ), padded
  # (a stock model of the size before the cut, with zeros where groups were cut)
  # or auto (uniform where it can be, else two_shape).
  config.export.layout = 'auto'
  # The model_type of a stock folder, such as llama or mistral, if it can hold
  # the model; or auto (the base's own, or where transformers does not take the
  # pruned sizes in it, another that is the same function).
  config.export.model_type = 'auto'
  # The dtype of the exported weights: float32, bfloat16, float16, or auto (the
  # dtype in which the base was loaded).
  config.export.dtype = 'auto'
  # The dtype of the GGUF file: f32, f16, bf16, q8_0, or auto (as export.dtype).
  config.export.gguf_dtype = 'auto'
  # The largest size of one weights file: a number and B, KB, MB, GB, KiB, MiB
  # or GiB.
  config.export.max_shard_size = '5GB'
  # Sizes to export on the way, each to rungs/SHARE of the workdir: descending
  # shares of the parameters that stay, such as 0.9,0.8, all above what the
  # target leaves. Empty: the last size alone (docs/targets.md).
  config.export.ladder = ''

  config.log = config_dict.ConfigDict()
  # Whether TensorBoard's files are written too, to workdir/tensorboard.
  config.log.tensorboard = False
  # The Weights & Biases project to log to (pip install wandb). Empty: none.
  config.log.wandb = ''

  config.report = config_dict.ConfigDict()
  # Texts that the dense and the pruned model continue, side by side.
  config.report.prompts = ('The weather today', 'The president said')
  # The most tokens in each continuation.
  config.report.max_new_tokens = 48
  # A config that sets a key which is not here is mistaken.
  return config.lock()
