"""A calibration on chat prompts is bound to target, draft and tokenizer, but not to the chat template that made its prompts: after the
template changes the guard still loads and the server still says calibrated: true."""
import os, sys, warnings, copy; os.environ["OMP_NUM_THREADS"]="1"; warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from telltale.models.loading import tokenizer_fingerprint
tok=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<e>":0,"a":1},unk_token="a")),eos_token="<e>",unk_token="a")
tok.chat_template="User: {{ messages[0]['content'] }}\nThink step by step."
other=copy.deepcopy(tok); other.chat_template="{{ messages[0]['content'] }}"
same=tokenizer_fingerprint(tok)==tokenizer_fingerprint(other)
print(f"same tokenizer fingerprint with another chat template: {same}")
sys.exit(1 if same else 0)
