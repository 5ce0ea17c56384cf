#!/bin/sh
# The demo: fine-tune, see the base and the adapter side by side, merge, ask the merged model. Every command is shown.
set -eu

lamina() {
    printf '\n$ lamina %s\n' "$*"
    .venv/bin/lamina "$@"
}

n=1
while [ -e "runs/demo-$n" ]; do n=$((n + 1)); done
run=runs/demo-$n

lamina train demo --out "$run"
lamina merge "$run" --out "$run/merged"

# Questions about characters whose facts no fine-tuning example tells: the first rows of the held-out file.
sed -n '1,3s/.*"user", "content": "\([^"]*\)".*/\1/p' src/lamina/jobs/demo/held_out.jsonl >"$run/questions.txt"
lamina generate "$run/merged" --prompts "$run/questions.txt"

printf '\nTalk to it: .venv/bin/lamina chat %s\n' "$run"
