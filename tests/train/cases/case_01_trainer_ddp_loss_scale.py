"""LayerSkipTrainer under DistributedDataParallel: gradient and logged loss must equal the single-process ones (as plain Trainer's do)."""
import os, subprocess, sys, tempfile
os.environ["OMP_NUM_THREADS"] = "1"
if "CHILD" not in os.environ:
    import re
    def run(prefix, bs):
        env = os.environ | {"CHILD": str(bs)}
        out = subprocess.run([*prefix, __file__], env=env, capture_output=True, text=True, timeout=120).stdout
        return float(re.search(r"NORM ([\d.]+)", out).group(1))
    one = run([sys.executable], 4)
    two = run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "29617"], 2)
    print(f"weight step with 2 ranks / 1 process, same global batch: {two / one:.3f} (expected 1.000)")
    sys.exit(abs(two / one - 1) > 1e-2)
import torch, transformers as T
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.hf_trainer import LayerSkipTrainer
torch.manual_seed(0)
m = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0))
w = [p.detach().clone() for p in m.parameters()]
g = torch.Generator().manual_seed(0)
data = [{"input_ids": (x := torch.randint(1, 64, (12,), generator=g)), "labels": x} for _ in range(4)]
args = T.TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=int(os.environ["CHILD"]), learning_rate=1.0, optim="sgd",
                           max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, weight_decay=0.0)
LayerSkipTrainer(m, args, train_dataset=data, layerskip=LayerSkipConfig(p_max=0.0, curriculum="none")).train()
if os.environ.get("RANK", "0") == "0":
    print("NORM", sum(float(((p.detach() - q) ** 2).sum()) for p, q in zip(m.parameters(), w)) ** 0.5)
