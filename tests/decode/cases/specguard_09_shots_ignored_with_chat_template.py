"""`--shots N` (calibrate, report) is silently ignored where the tokenizer has a chat template, and N problems (4 by default) are thrown
away all the same; nothing else lets one choose the prompt form."""
import os, sys, json, tempfile, warnings; os.environ["OMP_NUM_THREADS"]="1"; warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from telltale.cli.specguard import _gsm8k
from pathlib import Path
f=Path(tempfile.mkdtemp())/"p.jsonl"
f.write_text("".join(json.dumps({"question":f"What is {i} + 1?","answer":f"{i} + 1 = <<{i}+1={i+1}>>{i+1}\n#### {i+1}"})+"\n" for i in range(10)))
tk=Tokenizer(models.BPE(vocab={c:i for i,c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},merges=[])); tk.pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False); tk.decoder=decoders.ByteLevel()
tok=PreTrainedTokenizerFast(tokenizer_object=tk); tok.chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
try: rest,_,encode=_gsm8k(f,None,0,3)
except Exception as e: print("refused:",str(e)[:100]); sys.exit(0)
text=tok.decode(encode(tok,rest[0])); used="What is 0" in text
rest0,_,_=_gsm8k(f,None,0,None)
print(f"3 shots asked for, worked examples in the prompt: {used}; problems left of 10: {len(rest)} (without --shots {len(rest0)})")
sys.exit(0 if used else 1)
