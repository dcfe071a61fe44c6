"""`n` choices of one prompt share nothing: the prompt is run through both models n times (branches that share a prefix exist and are
used for candidates). Counts tokens through the target in prefill, n=8 against n=1."""
import os, sys, warnings, tempfile; os.environ["OMP_NUM_THREADS"]="1"; warnings.simplefilter("ignore")
import torch; torch.set_num_threads(1)
from tokenizers import Tokenizer, models, decoders
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words=["<e>","a "]+[f"w{i} " for i in range(30)]
tk=Tokenizer(models.WordLevel({w:i for i,w in enumerate(words)},unk_token="a ")); tk.decoder=decoders.Fuse()
tok=PreTrainedTokenizerFast(tokenizer_object=tk,eos_token="<e>",unk_token="a ")
torch.manual_seed(0)
m=LlamaForCausalLM(LlamaConfig(vocab_size=32,hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=1,max_position_embeddings=1024,eos_token_id=None,bos_token_id=None)).eval()
folder=tempfile.mkdtemp(); m.save_pretrained(folder); tok.save_pretrained(folder)
from fastapi.testclient import TestClient
from telltale.serve.openai_app import create_app
from telltale.serve.open_model import open_served
app=create_app(open_served(folder,name="m",decode="autoregressive"))
with TestClient(app) as c:
    e=app.state.service.scheduler
    def cost(n):
        before=e._engine.target.layer_executions[-1]; r=c.post("/v1/completions",json=dict(model="m",prompt=[2+i%30 for i in range(600)],max_tokens=1,n=n,seed=1)); assert r.status_code==200,r.text
        return e._engine.target.layer_executions[-1]-before
    one,eight=cost(1),cost(8)
print(f"tokens through the target: n=1 {one}, n=8 {eight} ({eight/one:.1f}x) for a prompt of 600 and one new token each")
sys.exit(0 if eight<2*one else 1)
