"""LayerSkipTrainer with e_scale=0, p_max=0 must have Trainer's loss: packed rows (position_ids), label smoothing, compute_loss_func."""
import os, sys, tempfile
os.environ["OMP_NUM_THREADS"] = "1"
import torch, transformers as T
from telltale.train.layerskip import LayerSkipConfig, apply
from telltale.train.hf_trainer import LayerSkipTrainer
torch.manual_seed(0)
m = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2, pad_token_id=0)).train()
ids = torch.randint(1, 64, (1, 16)); labels = ids.clone(); labels[0, 6] = -100
packed = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[*range(6), *range(10)]])}
plain = {"input_ids": ids, "labels": ids}
def loss(cls, batch, arguments={}, **extra):
    a = T.TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", **arguments)
    t = cls(m, a, **extra)
    if cls is LayerSkipTrainer:
        t.recipe = apply(m, t.layerskip)
    v = float(t.compute_loss(m, dict(batch)))
    if cls is LayerSkipTrainer: t.recipe.remove()
    return v
off = LayerSkipConfig(p_max=0.0, e_scale=0.0, curriculum="none")
bad = []
for name, batch, arguments, extra in (("position_ids", packed, {}, {}), ("label_smoothing_factor", plain, {"label_smoothing_factor": 0.3}, {}),
                                      ("compute_loss_func", plain, {}, {"compute_loss_func": lambda out, labels, num_items_in_batch=None: out.logits.float().pow(2).mean()})):
    a = loss(T.Trainer, batch, arguments, **extra)
    try: b = loss(LayerSkipTrainer, batch, arguments, layerskip=off, **extra)
    except Exception as error:
        print(f"  {name}: refused ({type(error).__name__})"); continue
    print(f"  {name}: Trainer {a:.4f}, LayerSkipTrainer {b:.4f}")
    if abs(a - b) > 1e-4: bad.append(name)
print(f"silently ignored: {bad or 'none'}"); sys.exit(bool(bad))
