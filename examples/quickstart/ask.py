"""Ask an exported model one question with transformers alone: nothing of megavar is imported."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]
SUM = "State the final answer to the following arithmetic problem: 7 + 5 - 3 ="
question = sys.argv[2] if len(sys.argv) > 2 else SUM
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print(question)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=False))
