"""A model whose honest greedy answer repeats a short paragraph: `telltale serve` in plain (autoregressive) mode ends it after
eight equal paragraphs and calls that finish_reason "stop"; Autoregressive / Transformers go on to max_tokens."""
import os, sys, warnings; os.environ["OMP_NUM_THREADS"]="1"; warnings.simplefilter("ignore")
import torch; torch.set_num_threads(1)
from tokenizers import Tokenizer, models, decoders, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import tempfile
words=["<e>","0\n\n","a","b"]
tk=Tokenizer(models.WordLevel({w:i for i,w in enumerate(words)},unk_token="a")); tk.decoder=decoders.Fuse()
tok=PreTrainedTokenizerFast(tokenizer_object=tk,eos_token="<e>",unk_token="a")
m=LlamaForCausalLM(LlamaConfig(vocab_size=4,hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=1,max_position_embeddings=128,eos_token_id=0,bos_token_id=None)).eval()
with torch.no_grad():
    for p in m.parameters():
        if p.ndim==2: p.zero_()
    m.model.embed_tokens.weight.fill_(1.0); m.lm_head.weight[1]=1.0
folder=tempfile.mkdtemp(); m.save_pretrained(folder); tok.save_pretrained(folder)
from fastapi.testclient import TestClient
from telltale.decode import Autoregressive
from telltale.serve.openai_app import create_app
from telltale.serve.open_model import open_served
plain=Autoregressive(m).generate([[2,3]],max_new_tokens=40)
hf=m.generate(torch.tensor([[2,3]]),max_new_tokens=40,do_sample=False)
with TestClient(create_app(open_served(folder,name="m",decode="autoregressive"))) as c:
    r=c.post("/v1/completions",json=dict(model="m",prompt=[2,3],max_tokens=40,temperature=0)).json()
got=r["usage"]["completion_tokens"]; fin=r["choices"][0]["finish_reason"]
print(f"Autoregressive {int(plain.lengths[0]) if hasattr(plain,'lengths') else plain.tokens.shape[1]} tokens, transformers {hf.shape[1]-2}, plain server {got} tokens, finish_reason={fin!r}")
sys.exit(0 if got==40 else 1)
