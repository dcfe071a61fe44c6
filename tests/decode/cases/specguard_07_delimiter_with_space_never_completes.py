"""`delimiter` is any text, but with a SentencePiece tokenizer one that ends in a space is never seen: a token is judged by its text
alone, where the decoder strips the leading space. Every draft is then "overlong" and rejected, silently."""
import os, sys, warnings; os.environ["OMP_NUM_THREADS"]="1"; warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models, decoders
from transformers import PreTrainedTokenizerFast
from telltale.decode.stopping import StepText
v={"<unk>":0,"</s>":1,"▁One":2,".":3,"▁Two":4}
sp=Tokenizer(models.BPE(vocab=v,merges=[],unk_token="<unk>"))
sp.decoder=decoders.Sequence([decoders.Replace("▁"," "),decoders.Fuse(),decoders.Strip(" ",1,0)])   # as Llama-2, Mistral, Gemma ship it
tok=PreTrainedTokenizerFast(tokenizer_object=sp,eos_token="</s>",unk_token="<unk>")
s=StepText(tok,". "); text=s.text([2,3,4]); done=s.ends([2,3,4])
print(f"step text {text!r} holds the delimiter '. ': {'. ' in text}; completes: {done}")
sys.exit(0 if done else 1)
