"""Settings: unknown ones, wrong types, impossible values, meshes."""

from tests.errors.case import (
  Case,
  Place,
  tiny_override,
  train_model,
  train_tiny,
  with_argv,
)


def _with_biases(did: str, *settings: str) -> Case:
  """Prunes a MODEL that has biases."""

  def argv(place: Place) -> list[str]:
    place.model(attention_bias=True)
    place.text()
    return train_model('prune.protect=none', *settings)

  return Case(did, argv)


CASES = [
  # Keys and types.
  tiny_override('prune.tarot=0.3'),
  tiny_override('zzz=1'),
  tiny_override('train.steps.many=1'),
  tiny_override('train.steps=many'),
  tiny_override('train.steps=1.5'),
  tiny_override('prune.target=half'),
  tiny_override('prune.heads_target=half'),
  tiny_override('prune.channels=maybe'),
  tiny_override('prune=3'),
  # Model.
  tiny_override('model.path=MODEL', 'with model.sizes set too'),
  tiny_override('model.base_dtype=int4'),
  Case(
    '`--config.model.base_dtype=int8 --config.prune.criterion=gradient`',
    with_argv(*train_tiny('model.base_dtype=int8', 'prune.criterion=gradient')),
  ),
  tiny_override('model.compute_dtype=float16'),
  tiny_override('model.remat=all'),
  tiny_override('model.matmul_dtype=int8'),
  tiny_override('model.attention=flash'),
  tiny_override('model.attention=splash', 'on a CPU'),
  tiny_override('model.sizes.model_type=qwen3_next'),
  tiny_override('model.sizes.hidden_size=0'),
  tiny_override('model.sizes.num_key_value_heads=3', 'with 8 query heads'),
  # Training.
  tiny_override('train.steps=0'),
  tiny_override('train.seq_len=129', 'of a model with 128 positions'),
  tiny_override('train.seq_len=1'),
  tiny_override('train.micro_batch_size=5', 'with train.batch_size=16'),
  tiny_override('train.learning_rate=-1'),
  tiny_override('train.learning_rate=inf'),
  tiny_override('train.lr_schedule=step'),
  tiny_override('train.clip_norm=0'),
  tiny_override('train.seed=-1'),
  tiny_override('train.loss_chunk=-1'),
  tiny_override('train.compiler_options=fast'),
  tiny_override('train.compiler_options=xla_go_faster=true'),
  tiny_override('train.log_every=0'),
  tiny_override('train.checkpoint_every=0'),
  tiny_override('lora.rank=0'),
  tiny_override('lora.alpha=0'),
  tiny_override('lora.dropout=1'),
  tiny_override('lora.targets=qproj'),
  tiny_override('lora.targets='),
  # Pruning.
  tiny_override('prune.target=1.2'),
  tiny_override('prune.calibration_steps=0'),
  tiny_override('prune.fit=8 GX'),
  tiny_override('prune.fit=8GB', 'of a model that fits as it is'),
  tiny_override('prune.fit=30KB', 'less than the embeddings take'),
  tiny_override('prune.fit=100KB', 'less than the smallest model takes'),
  Case(
    '`--config.prune.fit=300KB --config.prune.target=0.5`',
    with_argv(*train_tiny('prune.fit=300KB', 'prune.target=0.5')),
  ),
  *(
    Case(
      f'`--config.prune.fit=300KB --config.{more}`',
      with_argv(*train_tiny('prune.fit=300KB', more)),
    )
    for more in (
      'prune.fit_context=129',
      'export.layout=padded',
    )
  ),
  tiny_override('prune.speedup=0.5'),
  Case(
    '`--config.prune.speedup=2 --config.prune.channels_multiple_of=128 '
    '--config.prune.heads=none`',
    with_argv(
      *train_tiny(
        'prune.speedup=2', 'prune.channels_multiple_of=128', 'prune.heads=none'
      )
    ),
  ),
  Case(
    '`--config.prune.target=0 --config.prune.order=none`',
    with_argv(*train_tiny('prune.target=0', 'prune.order=none')),
  ),
  tiny_override('recover.steps=-1'),
  tiny_override('recover.learning_rate=-1.0'),
  tiny_override('recover.data=synthetic:2', 'without recover.steps'),
  tiny_override('prune.target=0.001', 'which rounds to nothing'),
  tiny_override('prune.order=later'),
  tiny_override('prune.criterion=taylor'),
  tiny_override('prune.score=cube'),
  tiny_override('prune.lora_gradient=half'),
  tiny_override('prune.lora_gradient=first_order'),
  tiny_override('prune.unit=flops'),
  tiny_override('prune.heads=all'),
  tiny_override('prune.protect=last'),
  tiny_override('prune.layer_profile=1,-1'),
  tiny_override('prune.layer_profile=1,1,1,1', 'of a model with 4 layers'),
  tiny_override('prune.layer_profile=0,1,3', 'with prune.target=0.5'),
  tiny_override('prune.layers_target=0.9', 'of a model with 4 layers'),
  tiny_override('prune.layers_criterion=depth'),
  *(
    Case(
      f'`--config.prune.layers_target=0.4 {flags}`',
      with_argv(*train_tiny('prune.layers_target=0.4'), *flags.split()),
    )
    for flags in (
      '--config.prune.layer_profile=1,2',
      '--config.prune.fit=400KB --config.prune.heads=none '
      '--config.prune.channels=False',
      '--config.prune.unit=params --config.prune.target=0.1',
      '--config.prune.unit=params --config.prune.heads=none '
      '--config.prune.channels=False',
      '--config.prune.criterion=obs --config.prune.layers_criterion=sum',
    )
  ),
  tiny_override('train.distill=2'),
  tiny_override('train.distill_top_k=-1'),
  Case(
    '`--config.train.distill=1 --config.prune.order=none`',
    with_argv(*train_tiny('train.distill=1', 'prune.order=none')),
  ),
  *(
    Case(
      f'`--config.train.distill=0.5 --config.{more}`',
      with_argv(*train_tiny('train.distill=0.5', more)),
    )
    for more in ('train.distill_top_k=256', 'train.distill_top_k=0')
  ),
  tiny_override('prune.scope=global', 'which was removed'),
  tiny_override('prune.blocks=4', 'which was removed'),
  tiny_override('prune.compensate=wish'),
  tiny_override('prune.compensate=bias'),
  tiny_override('prune.compensate_damping=0.1', 'which was removed'),
  tiny_override('prune.compensate_batches=-1'),
  Case(
    '`--config.prune.compensate_batches=1` and one micro-batch in a step',
    with_argv(
      *train_tiny('prune.compensate_batches=1', 'train.micro_batch_size=16')
    ),
  ),
  Case(
    '`--config.prune.compensate_data=synthetic:7 '
    '--config.prune.compensate=none`',
    with_argv(
      *train_tiny('prune.compensate_data=synthetic:7', 'prune.compensate=none')
    ),
  ),
  tiny_override('prune.every=0'),
  tiny_override('prune.warmup=0.95', 'with prune.cooldown=0.1'),
  tiny_override('prune.decay=1.5'),
  tiny_override('prune.shrink=0.8,0.5'),
  Case(
    '`--config.prune.shrink=0.5 --config.prune.order=none`',
    with_argv(*train_tiny('prune.shrink=0.5', 'prune.order=none')),
  ),
  tiny_override('export.ladder=0.8,0.9'),
  tiny_override('export.ladder=0.9,0.5', 'of a model that keeps more'),
  Case(
    '`--config.export.ladder=0.9,0.89 --config.prune.channels_multiple_of=64`',
    with_argv(
      *train_tiny('export.ladder=0.9,0.89', 'prune.channels_multiple_of=64')
    ),
  ),
  *(
    Case(
      f'`--config.export.ladder=0.9,0.8 --config.prune.{more}`',
      with_argv(*train_tiny('export.ladder=0.9,0.8', f'prune.{more}')),
    )
    for more in ('every=30', 'order=none', 'rung_steps=9,9')
  ),
  *(
    Case(
      '`--config.export.ladder=0.9,0.8 --config.prune.order=prune_then_tune '
      f'--config.prune.rung_steps={steps}`',
      with_argv(
        *train_tiny(
          *('export.ladder=0.9,0.8', 'prune.order=prune_then_tune'),
          f'prune.rung_steps={steps}',
        )
      ),
    )
    for steps in ('9,0', '9', '25,25')
  ),
  tiny_override('prune.heads_multiple_of=0'),
  tiny_override('prune.heads_multiple_of=4', 'of a model with 4 KV heads'),
  tiny_override('lora.targets=gate_proj', 'while heads are pruned'),
  Case(
    '`--config.prune.order=none --config.lora.targets=o_proj,down_proj`',
    with_argv(*train_tiny('prune.order=none', 'lora.targets=o_proj,down_proj')),
  ),
  # Export.
  tiny_override('export.layout=uniform', 'with protected layers'),
  tiny_override('export.layout=zip'),
  tiny_override('export.model_type=gpt2', varies='(?<=auto, ).*'),
  _with_biases(
    '`--config.export.model_type=mistral`, of a MODEL with biases',
    'export.model_type=mistral',
  ),
  tiny_override('export.dtype=int8'),
  tiny_override('export.format=zip'),
  tiny_override('export.format=gguf', 'without hf'),
  tiny_override('export.gguf_dtype=q4'),
  tiny_override('export.max_shard_size=5'),
  tiny_override('data.eval_every=-1'),
  tiny_override('report.max_new_tokens=-1'),
  # Meshes.
  tiny_override('mesh.tensor=3', 'on 8 devices', devices=8),
  tiny_override('mesh.fsdp=16', 'on 8 devices', devices=8),
  tiny_override('mesh.data=-1', 'with mesh.fsdp=-1', devices=8),
  tiny_override('mesh.tensor=0', devices=8),
  tiny_override('mesh.tensor=8', 'of a model with 4 KV heads', devices=8),
  Case(
    '`--config.mesh.sequence=4 --config.train.seq_len=30`',
    with_argv(*train_tiny('mesh.sequence=4', 'train.seq_len=30')),
    devices=8,
  ),
  tiny_override('train.micro_batch_size=4', 'on 8 devices', devices=8),
]
