"""Ask the built-in model a question and stream the answer (fetches 93 MB once)."""

import graphopt
from graphopt.models import load

program = graphopt.compile(load("smollm2-135m", weights="packed"), activations="int8")
for event in program.stream(program.chat_prompt("Name three primary colours."), max_tokens=48):
    print(event.text, end="", flush=True)
print()
