#!/usr/bin/env bash
# Goes the way of the README's first page with the student that ships, on terminals of 80 and 200 columns:
#
#   scripts/first_hour.sh [--no-training]
#
# Builds `still`, asks it about a document of 5,000 words with ten planted facts, trains a student of the demo's books by the usual
# recipe, interrupts that once, resumes it, and shows the verdict. Each part has the time it may take. Needs `script` (util-linux)
# and python3 with pip. What the terminal showed is kept in target/first_hour.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 1
}
for tool in cargo script python3; do
  command -v "$tool" >/dev/null || fail "$tool is not installed" "install $tool"
done
training=yes
case ${1:-} in
  --no-training) training= ;;
  '') ;;
  *) fail "there is no option $1" "leave it out, or use --no-training" ;;
esac
cargo build --release --locked --bin still
still=$PWD/target/release/still
kept=$PWD/target/first_hour
rm -rf "$kept"
mkdir -p "$kept"
cp crates/still-cli/demo/document.txt "$kept/report.txt"
cd "$kept"

# on_terminal NAME COLUMNS SECONDS COMMAND…: runs it on a terminal; fails if it takes longer, or a row is too long.
on_terminal() {
  local name=$1 columns=$2 seconds=$3 started=$SECONDS code=0
  shift 3
  printf -v line '%q ' "$@"
  script -qec "stty cols $columns rows 40; timeout -s INT $seconds $line" "$name.$columns" >/dev/null </dev/null || code=$?
  echo "$name, $columns columns: exit code $code after $((SECONDS - started)) s"
  python3 - "$name.$columns" "$columns" <<'P'
import re, sys
text = open(sys.argv[1], errors="replace").read()
text = re.sub(r"^Script started.*\n|\n*Script done.*\n?$", "", text)
shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
columns = int(sys.argv[2])
long = [row for row in re.split(r"[\r\n]+", shown) if len(row) > columns]
# A reply, an error and the model's own text may be longer: the terminal wraps them.
bars = [row for row in long if re.match(r" *[A-Z][a-z]+ .*\[[=> ]+\]", row)]
if bars or "\x1b" in shown:
    sys.exit(f"error: {sys.argv[1]}: a bar is wider than the terminal, or an escape sequence is shown\nhint: look at {bars[:1]}")
P
  return "$code"
}

for columns in 80 200; do
  rm -rf r.still mine mine.run
  on_terminal demo "$columns" 300 "$still" demo
  on_terminal ask "$columns" 120 "$still" ask --model demo --file report.txt --session r.still \
    'When does the ferry to Inverloch leave?'
  on_terminal again "$columns" 30 "$still" ask --model demo --session r.still 'What is the doctor in Ashby called?'
  grep -q 'Opened r.still' "again.$columns" || fail "the session was not opened" "look at $kept/again.$columns"
  [ -n "$training" ] || continue
  base=$(python3 -c 'import os;print(os.path.join(os.environ.get("STILL_CACHE") or os.path.expanduser("~/.cache/still"), "SmolLM2-135M-Instruct.Q4_1.gguf"))')
  train=("$still" linearize --model "$base" --data demo --out mine --delta)
  # Ctrl-C comes in stage 1 or 2: after calibration, which takes a minute or two.
  if on_terminal interrupted "$columns" 240 "${train[@]}"; then
    echo "the run was over before it could be interrupted"
  else
    grep -q 'Stopping' "interrupted.$columns" || fail "Ctrl-C was not answered" "look at $kept/interrupted.$columns"
    on_terminal resumed "$columns" 1800 "${train[@]}" --resume
    grep -q 'Next:' "resumed.$columns" || fail "there is no verdict" "look at $kept/resumed.$columns"
  fi
  on_terminal mine "$columns" 120 "$still" ask --model mine --file report.txt 'Who is the doctor in Ashby?'
done

"$still" demo --json >demo.json 2>/dev/null
python3 - demo.json <<'P'
import json, sys
facts = json.load(open(sys.argv[1]))["facts"]
right = {name: sum(fact[name]["right"] for fact in facts) for name in ("teacher", "student")}
print(f"planted facts: teacher {right['teacher']} of {len(facts)}, student {right['student']}")
P
echo "what the terminals showed: $kept"
